"""Each layer of EDM2 keeps the magnitude of standard normal inputs."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.nn import magnitude_preserving as mp


def _magnitude(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 64, 16, 16, generator=generator)


LAYERS = {
    "silu": mp.mp_silu,
    "sum": lambda x: mp.mp_sum(x, x.flip(0), 0.3),
    "cat": lambda x: mp.mp_cat(x, x[:, :16].flip(0), 0.5),
    "cat, unequal": lambda x: mp.mp_cat(x, x[:, :16].flip(0), 0.2),
    "pixel norm": lambda x: mp.pixel_norm(7 * x),
    "3x3": lambda x: mp.MPConv2d(64, 48, 3)(x)[:, :, 1:-1, 1:-1],  # zeros are beyond the edges
    "1x1": mp.MPConv2d(64, 48, 1),
    "linear": lambda x: mp.MPLinear(64, 48)(x.movedim(1, -1)),
    "fourier": lambda x: mp.MPFourier(4096)(x[0, 0, 0]),
    "classes": lambda x: mp.MPEmbedding(10, 4096)(torch.arange(10)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_keeps_the_magnitude(layer: str, images: torch.Tensor) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        result = LAYERS[layer](images)
    assert _magnitude(result) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("balance", [0.2, 0.5, 0.9])
def test_the_parts_of_a_concatenation_have_the_shares_of_the_balance(
    balance: float, images: torch.Tensor
) -> None:
    result = mp.mp_cat(images, images[:, :16].flip(0), balance)
    share = result[:, 64:].square().sum() / result.square().sum()
    both = (1 - balance) ** 2 + balance**2
    assert float(share) == pytest.approx(balance**2 / both, abs=0.01)


def test_the_magnitude_of_silu_is_that_of_a_standard_normal_variable() -> None:
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    mean = float(torch.trapezoid((x * torch.sigmoid(x)).square() * density, x))
    assert math.sqrt(mean) == pytest.approx(mp.SILU_MAGNITUDE, abs=5e-4)


def test_a_multiple_of_a_weight_computes_the_same(images: torch.Tensor) -> None:
    layer = mp.MPConv2d(64, 8, 3).double()
    x = images[:1].double()
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(1000)
        torch.testing.assert_close(layer(x), before, rtol=2e-4, atol=1e-4)
        layer.normalise()
        rows = layer.weight.flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(rows, torch.ones_like(rows), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_computed_in_float32(dtype: torch.dtype, images: torch.Tensor) -> None:
    x = (images[:1] * 300).to(dtype)  # squares beyond float16
    result = mp.pixel_norm(x)
    assert result.dtype == dtype
    expected = mp.pixel_norm(x.double())
    torch.testing.assert_close(result.double(), expected, rtol=0.005, atol=1e-3)
