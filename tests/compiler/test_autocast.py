"""Graphs under autocast, and graphs that switch it on or off within themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from judging import assert_changes_are_seen, compiled, graphs, settled
from lowering import case, case_in, error, fused
from models import CASES
from small import small_inputs, small_net
from torch import nn

from fastdiff.compiler import explain
from fastdiff.ops.backend import isa

QUICK = ("guided", "diffusers")
MODELS = ["small", *(n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES)]


def autocast(dtype=torch.bfloat16, **options):
    return torch.autocast("cpu", dtype, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_error_dtype_and_strides(name, dtype):
    """In bfloat16 at most twice eager's error, and no more than eager's in float16."""
    model, args, kwargs = case(name)
    with autocast(dtype):
        plain = model(*args, **kwargs)
        found = settled(compiled(model), args, kwargs)
        assert torch.is_autocast_enabled("cpu")
    assert (found.dtype, found.stride()) == (plain.dtype, plain.stride())
    assert error(found, name) <= (2 if dtype == torch.bfloat16 else 1) * error(plain, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_as_much_is_fused_as_without_autocast(name, dtype):
    model, args, kwargs = case(name)
    plain, plain_args, plain_kwargs = case_in(name, dtype)
    with autocast(dtype):
        told = explain(model, *args, **kwargs)
    wanted = explain(plain, *plain_args, **plain_kwargs)
    assert told.reasons == wanted.reasons == ()
    if name == "lucid" and dtype == torch.bfloat16:
        # Its norms multiply by float32 gains, so that autocast's activations behind them are
        # float32 and stay outside of the convolutions. As many of these are fused.
        assert fused(told).total() == fused(wanted).total()
    else:
        assert fused(told) == fused(wanted)
    computed_in = "bfloat16" if dtype == torch.bfloat16 else "float32"
    assert {row.dtype for row in told.fused} == {computed_in}


@torch.no_grad()
def test_float16_autocast_in_bfloat16():
    model, args, _ = case("small")
    with autocast(torch.float16):
        found = settled(compiled(model, options={"precision": "bf16"}), args)
        told = explain(model, *args, options={"precision": "bf16"})
    with autocast():
        plain = model(*args)
    assert found.dtype == torch.float16
    assert error(found, "small") <= 2 * error(plain, "small")
    assert {row.dtype for row in told.fused} == {"bfloat16"}


@pytest.mark.skipif(isa() == "none", reason="without the C++ extension none are")
@torch.no_grad()
def test_runs_from_a_list_within_one_block_and_in_the_next(runs):
    """Eager autocast keeps converted weights until its block ends; a list cannot know of these."""
    model, args = small_net(), small_inputs()
    net = compiled(model)
    for _ in range(2):
        with autocast():
            for _ in range(4):
                net(*args)
    assert len(runs) == 6


@torch.no_grad()
def test_each_state_has_a_graph_of_its_own():
    model, args = small_net(), small_inputs()
    net = compiled(model)
    before = net(*args)
    for dtype in (torch.bfloat16, torch.float16):
        with autocast(dtype):
            assert net(*args).dtype == dtype
            with autocast(enabled=False):
                assert torch.equal(net(*args), before)
    assert torch.equal(net(*args), before)
    assert graphs() == 3


@torch.no_grad()
def test_changed_weights_are_seen():
    model, args = small_net(), small_inputs()
    net = compiled(model)
    with autocast():
        assert_changes_are_seen(net, model, args, torch.float32)


@torch.no_grad()
def test_autocast_is_on_again_after_an_error():
    net = compiled(torch.linalg.cholesky)
    with autocast():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="positive-definite"):
                net(-torch.eye(2))
            assert torch.is_autocast_enabled("cpu")


class Regions(nn.Module):
    """Convolutions of which some are under autocast, as ``outer`` and ``inner`` say."""

    def __init__(self, outer, inner):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.norm, self.outer, self.inner = nn.GroupNorm(4, 8), outer, inner

    def forward(self, x):
        with torch.autocast("cpu", **self.outer):
            h = self.convs[0](x)
            with torch.autocast("cpu", **self.inner):
                h = self.convs[1](F.silu(self.norm(h.float())))
            y = self.convs[2](h.float())
        return h, y, y.float() + x.mean()


ON, OFF = {"dtype": torch.bfloat16}, {"enabled": False}
HALF = {"dtype": torch.float16}


@pytest.mark.parametrize("around", [None, ON, HALF], ids=["plain", "bf16", "f16"])
@pytest.mark.parametrize(
    ("outer", "inner"), [(ON, OFF), (OFF, ON), (HALF, OFF), (ON, HALF), (OFF, OFF)], ids=str
)
@torch.no_grad()
def test_regions(around, outer, inner):
    model, x = Regions(outer, inner).eval(), torch.randn(2, 3, 6, 7)
    with torch.autocast("cpu", **(around or OFF)):
        wanted, found = model(x), settled(compiled(model), (x,))
        told = explain(model, x)
    assert told.reasons == ()
    assert sum(row.what.count("conv") for row in told.fused) == 3
    for a, b in zip(found, wanted, strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert (a.double() - b.double()).abs().max() <= 0.03 * b.double().abs().max()


def products(x, w):
    h, images = F.conv2d(x, w), x.flatten(2)
    rows, square = h.flatten(2).transpose(1, 2), x[0, 0]
    return (
        h, rows @ rows.mT, torch.bmm(images, images.mT), torch.matmul(rows.float(), rows.mT),
        torch.einsum("bic,bjc->bij", rows, rows), torch.einsum("bic,bic->bc", images, images),
        F.conv_transpose2d(x, w.transpose(0, 1)), torch.addmm(square, square, square),
    )  # fmt: skip


def of_float32(x, w):
    """Operations that autocast computes in float32, or leaves."""
    h = F.conv2d(x, w)
    return (
        h.prod(dim=1), F.mse_loss(h, h), h.softmax(1), h.exp(), h.sum((2, 3)), h.pow(2),
        F.pad(h, (1, 1, 1, 1), mode="reflect"), torch.cdist(h, h), F.layer_norm(h, h.shape[1:]),
        torch.cat([h, x], 1), torch.stack([h, h.float()]), h + x, h * 2, F.gelu(h),
        F.interpolate(h, scale_factor=2.0), F.interpolate(h, scale_factor=2.0, mode="bilinear"),
        F.avg_pool2d(h, 2), h.mean().item() > 1e9,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [products, of_float32], ids=lambda f: f.__name__)
@torch.no_grad()
def test_dtypes_of_every_kind_of_operation(function, dtype):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator) for s in ((2, 4, 4, 4), (4, 4, 1, 1)))
    with autocast(dtype):
        wanted, found = function(x, w), torch.compile(function, backend="fastdiff")(x, w)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype, i
            torch.testing.assert_close(a, b, atol=0.05, rtol=0.05, msg=str(i))
        else:
            assert a == b
