"""EDM2's blocks: normalised weights are computed once, constants are folded, gains are fused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from judging import assert_as_eager, assert_changes_are_seen, compiled, distance, settled
from models import randomized
from torch import nn

from fastdiff.compiler import explain
from fastdiff.compiler.network import FusedNetwork, TrainedNetwork
from fastdiff.nn import KarrasUNet
from fastdiff.ops import backend

kernels = pytest.mark.skipif(backend.extension is None, reason="needs the C++ extension")


def normalised(w, gain=1.0):
    """A weight as the paper normalises it, written otherwise than in ``fastdiff.nn``."""
    norm = torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True)
    norm = torch.add(1e-4, norm, alpha=(norm.numel() / w.numel()) ** 0.5)
    return w / norm * (gain / w[0].numel() ** 0.5)


def mp_silu(x):
    return x * torch.sigmoid(x) / 0.596


class PlainNet(nn.Module):
    """A block of the way down and one of the way up, in plain functions."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"enter": (16, 3, 3), "one": (16, 16, 3), "two": (16, 16, 3), "three": (8, 32, 3),
                 "four": (8, 8, 3), "shortcut": (8, 32, 1), "leave": (3, 8, 3)}  # fmt: skip
        for name, (filters, channels, size) in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(filters, channels, size, size)))
        self.emb = nn.Linear(18, 24)
        self.gain = nn.Parameter(torch.empty([]))

    def conv(self, x, name, gain=1.0):
        w = getattr(self, name)
        return F.conv2d(x, normalised(w, gain), padding=w.shape[-1] // 2)

    def forward(self, x, emb):
        first, second = (self.emb(emb) + 1)[:, :, None, None].split((16, 8), dim=1)
        skip = self.conv(x, "enter")
        x = skip / (skip.square().mean(1, keepdim=True).sqrt() + 1e-4)
        h = self.conv(mp_silu(self.conv(mp_silu(x), "one") * first), "two")
        x = torch.lerp(x, h, 0.3) / 0.58**0.5
        x = torch.cat([1.25 * x, skip * 0.75], dim=1)
        h = self.conv(mp_silu(self.conv(mp_silu(x), "three") * second), "four")
        x = (0.7 * self.conv(x, "shortcut") + 0.3 * h) * 1.3
        return self.conv(x, "leave", self.gain)


def net():
    torch.manual_seed(0)
    return randomized(PlainNet()).eval()


def case(batch=2, size=(8, 12), dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(batch, 3, *size).to(dtype), torch.randn(batch, 18).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_eager(dtype):
    model = net().to(dtype)
    assert_as_eager(settled(compiled(model), case(dtype=dtype)), model, case(dtype=dtype))


@kernels
@torch.no_grad()
def test_what_is_fused():
    found = explain(net(), *case())
    assert sorted(row.what for row in found.fused) == [
        "cat + conv 1x1 + scale",
        "cat + silu + conv 3x3",
        "conv 3x3",
        "conv 3x3",
        "gain + silu + conv 3x3 + residual + scale",
        "gain + silu + conv 3x3 + residual + scale + scale + scale",
        "silu + conv 3x3",
    ]
    left = {name for name, _ in found.left}
    assert not left & {"conv2d", "silu", "sigmoid", "lerp", "cat", "mul", "linalg_vector_norm"}


@torch.no_grad()
def test_changes_of_weights_are_seen():
    model = net()
    assert_changes_are_seen(compiled(model), model, case(), torch.float32)


@torch.no_grad()
def test_dynamic_sizes():
    model = net()
    forward = compiled(model, dynamic=True)
    for batch, size in ((2, (8, 12)), (3, (6, 10)), (2, (16, 4))):
        assert_as_eager(forward(*case(batch, size)), model, case(batch, size))


@torch.no_grad()
def test_under_autocast():
    model = net()
    forward = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = forward(*case()), model(*case())
    assert found.dtype == wanted.dtype
    assert distance(found, wanted.double()) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("options", [{"precision": "strict"}, {"packed_bytes": 10**6}], ids=str)
def test_options(options):
    model = net()
    assert_as_eager(compiled(model, options=options)(*case()), model, case())


@torch.no_grad()
def test_weights_may_be_dropped():
    model, plain = net(), net()
    found = settled(compiled(model, options={"drop_weights": True}), case())
    assert_as_eager(found, plain, case())


class Between(nn.Module):
    """Constants where they could be the epilogue's of one convolution or the next one's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.one(x) * 3
        h = self.two(x / 7)
        return torch.lerp(h, x, 0.25) + h * 2


@kernels
@torch.no_grad()
def test_no_convolution_is_computed_twice():
    torch.manual_seed(0)
    model, x = randomized(Between()).eval(), case()[0]
    found = explain(model, x)
    assert len(found.fused) == 2
    assert "conv2d" not in {name for name, _ in found.left}
    assert_as_eager(compiled(model)(x), model, (x,))


def unet(**options):
    torch.manual_seed(0)
    model = KarrasUNet(
        block_out_channels=(16, 24), layers_per_block=1, attention_levels=(1,),
        attention_head_dim=8, **options,
    )  # fmt: skip
    with torch.no_grad():
        model.out_gain.fill_(0.8)
        model.embedding_gains.copy_(torch.linspace(-1, 1, len(model.embedding_gains)))
    return model


@kernels
@torch.no_grad()
@pytest.mark.parametrize("clip", [256.0, 0.5, None])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_network_without_dynamo(batch, clip):
    model = unet(clip=clip, num_class_embeds=3, concat_balance=0.4).eval()
    args = torch.randn(batch, 3, 8, 8), torch.tensor(0.3), torch.arange(batch)
    network = FusedNetwork(model)
    assert network._can_replace_call(args[0])
    assert_as_eager(settled(network, args), model, args)
    rows = {"precomputed": model.precompute(*args[1:], batch).at(0)}
    assert_as_eager(settled(network, args[:1], rows), model, args[:1], rows)


@kernels
def test_gradients():
    model = unet().train()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, -1.0])

    def gradients(call, x, t):
        model.zero_grad()
        call(x, t).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    found, eager = gradients(TrainedNetwork(model), x, t), gradients(model, x, t)
    model.double()
    exact = gradients(model, x.double(), t.double())
    assert len(found) == len(exact)
    for a, b, c in zip(found, eager, exact, strict=True):
        scale = c.norm()
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-4 * scale
