"""Models of signals and videos take the fused path whole: values, gradients, and what is left."""

from __future__ import annotations

import copy

import pytest
import torch
from judging import assert_as_eager, distance, settled
from nn.native_unet import TIMES, sample, unet

from fastdiff.compiler import network as networks
from fastdiff.compiler.network import FusedNetwork, TrainedNetwork
from fastdiff.ops import backend

pytestmark = pytest.mark.skipif(backend.extension is None, reason="needs the C++ extension")
# A level's residual block resamples (averages, or repeats pixels), and its neighbour's layer does.
RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}


@pytest.fixture
def reports(monkeypatch):
    """The report of each graph that is made."""
    seen = []

    class Kept(networks.GraphReport):
        def __init__(self):
            super().__init__()
            seen.append(self)

    monkeypatch.setattr(networks, "GraphReport", Kept)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, RESNETS], ids=["convolutions", "resnets"])
@pytest.mark.parametrize("dimensions", [1, 3])
def test_agrees_with_the_network(dimensions, options, dtype, reports):
    model = unet(dimensions, **options).to(dtype)
    net = FusedNetwork(model)
    for batch in (3, 1):
        args = sample(dimensions, batch).to(dtype), TIMES[:batch]
        assert_as_eager(settled(net, args), model, args)
        one = args[0], TIMES[:1]
        assert_as_eager(net(*one), model, one)
    assert len(reports) == 2  # a row of embeddings for each sample, and one for all


@torch.no_grad()
@pytest.mark.parametrize("dimensions", [1, 3])
def test_no_layer_is_left_out(dimensions, reports):
    FusedNetwork(unet(dimensions))(sample(dimensions), TIMES)
    (report,) = reports
    left = {name for name, _ in report.left}
    assert not left & {"conv2d", "linear", "group_norm", "silu", "scaled_dot_product_attention"}
    assert "interpolate" not in left
    names = [row.what for row in report.emitted]
    kernel = "conv 1x3" if dimensions == 1 else "conv 3x3"
    assert any(name.startswith(f"upsample + {kernel}") for name in names)
    assert any(name.startswith(f"norm + silu + {kernel} + emb") for name in names)
    assert any(name.startswith(f"norm + silu + {kernel} + residual") for name in names)


@pytest.mark.parametrize("options", [{}, RESNETS], ids=["convolutions", "resnets"])
@pytest.mark.parametrize("dimensions", [1, 3])
def test_gradients(dimensions, options):
    model, x = unet(dimensions, **options), sample(dimensions)
    net, exact = TrainedNetwork(model), copy.deepcopy(model).double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    oracle = torch.autograd.grad(
        exact(x.double(), TIMES), list(exact.parameters()), direction.double()
    )
    found = torch.autograd.grad(net(x, TIMES), list(model.parameters()), direction)
    scale = max(gradient.abs().max() for gradient in oracle)
    for (name, _), a, b in zip(model.named_parameters(), found, oracle, strict=True):
        assert (a.double() - b).abs().max() < 1e-5 * scale, name
    assert distance(net(x, TIMES).detach(), exact(x.double(), TIMES).detach()) < 1e-4


@torch.no_grad()
def test_rows_that_repeat_are_skipped_only_where_no_kernel_sees_two():
    """A convolution of height 3 reads repeated rows: columns alone being doubled is not fused."""
    for height in (1, 3):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(
            torch.nn.Upsample(scale_factor=(1, 2)),
            torch.nn.Conv2d(4, 8, (height, 3), padding=(height // 2, 1)),
        )
        x = torch.randn(2, 4, 5, 6)
        found = torch.compile(layers, backend="fastdiff", fullgraph=True)(x)
        torch.testing.assert_close(found, layers(x), rtol=1e-5, atol=1e-5)
