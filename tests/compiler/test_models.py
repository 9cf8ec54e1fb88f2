"""Whole models, compiled, against themselves: values, strides and no graph break."""

from __future__ import annotations

import pytest
import torch
from judging import LAYOUTS, assert_as_eager, compiled, distance, settled
from models import CASES, cast, in_float64, inputs, make, randomized
from torch import nn

OWN_CAST = ("guided", "improved")  # take and return float32 whatever their convolutions' dtype


def cases(quick):
    """All models, those marked slow that are not among ``quick``."""
    slow = pytest.mark.slow
    return [name if name in quick else pytest.param(name, marks=slow) for name in CASES]


@pytest.mark.parametrize(
    "name", cases(["guided", "lucid", "diffusers-cifar", "conditional", "autoencoder", "fastdiff"])
)
@torch.no_grad()
def test_odd_size_batch_1(name):
    model = make(name)
    args, kwargs = inputs(name, 1, CASES[name].odd)
    assert_as_eager(settled(compiled(model), args, kwargs), model, args, kwargs)


@pytest.mark.parametrize("name", cases(["autoencoder"]))
@torch.no_grad()
def test_channels_last_batch_3(name):
    model = make(name)
    args, kwargs = inputs(name, 3, layout=torch.channels_last)
    assert_as_eager(settled(compiled(model), args, kwargs), model, args, kwargs)


@pytest.mark.parametrize("name", cases(["diffusers", "plain-decoder"]))
@torch.no_grad()
def test_bfloat16(name):
    model = cast(make(name), torch.bfloat16)
    dtype = torch.float32 if name in OWN_CAST else torch.bfloat16
    args, kwargs = inputs(name, 3, CASES[name].odd, dtype, torch.channels_last)
    assert_as_eager(settled(compiled(model), args, kwargs), model, args, kwargs)


@pytest.mark.parametrize(
    "name",
    [
        "plain-decoder",
        "diffusers",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("guided", "conditional")),
    ],
)
@torch.no_grad()
def test_strict(name):
    model = make(name)
    args, kwargs = inputs(name, 2)
    found = settled(compiled(model, options={"precision": "strict"}), args, kwargs)
    assert_as_eager(found, model, args, kwargs, precision="strict")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastdiff", "autoencoder"])
@torch.no_grad()
def test_channels_last_weights(name):
    model = make(name).to(memory_format=torch.channels_last)
    args, kwargs = inputs(name, 1, layout=torch.channels_last)
    assert_as_eager(settled(compiled(model), args, kwargs), model, args, kwargs)


@torch.no_grad()
def test_compiled_in_place():
    model = make("plain-decoder")
    args, _ = inputs("plain-decoder")
    expected = model(*args)
    model.compile(backend="fastdiff", fullgraph=True)
    found = model(*args)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param("guided", "fast", marks=pytest.mark.slow),
        ("diffusers", "fast"),
        pytest.param("diffusers", "strict", marks=pytest.mark.slow),
        ("plain-decoder", "fast"),
        ("plain-decoder", "strict"),
    ],
)
@torch.no_grad()
def test_channels_whose_means_are_100_deviations(name, precision):
    model = shifted(make(name))
    args, kwargs = inputs(name, 2)
    args = (args[0] + 100, *args[1:])
    found = compiled(model, options={"precision": precision})(*args, **kwargs)
    assert_as_eager(found, model, args, kwargs, precision=precision)
    if precision == "fast":
        assert distance(found, in_float64(model, args, kwargs)) <= 1e-4


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Identity])
@pytest.mark.parametrize("precision", ["fast", "strict"])
@torch.no_grad()
def test_norm_of_channels_whose_means_are_300_deviations(activation, precision):
    """However the norm is computed, with another activation behind it or as the last layer."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), activation()]
    model = shifted(randomized(nn.Sequential(*layers)))
    x = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0)) / 10
    found = compiled(model, options={"precision": precision})(x)
    assert_as_eager(found, model, (x,), precision=precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_norm_of_single_values(dtype):
    """Its groups have no variance, so that what is left of a value less its mean is magnified."""
    layers = [nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(16, 16), nn.SiLU(), nn.Conv2d(16, 4, 1)]
    model = randomized(nn.Sequential(*layers)).to(dtype)
    x = torch.randn(2, 8, 1, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_as_eager(compiled(model)(x), model, (x,))


def shifted(model):
    """The model with biases that move what its norms read away from zero.

    What a block's second norm reads has deviations of 0.3 over the pixels of a channel.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels > 6:
                module.bias += 30
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_results_are_the_callers(layout):
    """A later call changes no earlier result, and no call changes its arguments."""
    model = make("plain-decoder")
    net = compiled(model)
    (a,), _ = inputs("plain-decoder", layout=LAYOUTS[layout])
    (b,), _ = inputs("plain-decoder", layout=LAYOUTS[layout], seed=2)
    given, first = a.clone(), net(a)
    kept = first.clone()
    second = net(b)
    assert torch.equal(first, kept)
    assert torch.equal(a, given)
    assert not torch.equal(first, second)
    assert torch.equal(net(a), kept)
    first.zero_()
    assert torch.equal(net(a), kept)
