"""The differentiable convolution with its norm and additions: gradients against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastdiff.ops.conv2d_spec import ConvSpec
from fastdiff.ops.norm_conv2d import Algorithms, NormConv2d, norm_conv2d, turned

GROUPS = 4
SAME = ConvSpec(12, 16, (3, 3), padding=(1, 1, 1, 1))
# Specs by name, and which algorithms compute result, gradient of the input, gradient of the weight.
SPECS = {
    "3x3": (SAME, Algorithms()),
    "silu": (replace(SAME, silu=True), Algorithms("winograd2", "winograd2", "winograd2")),
    "winograd": (replace(SAME, silu=True), Algorithms("winograd4", "winograd4", "winograd4")),
    "no padding": (replace(SAME, padding=(0, 0, 0, 0)), Algorithms("winograd4", "winograd4")),
    "one side": (replace(SAME, padding=(0, 1, 2, 0)), Algorithms()),
    "wide padding": (replace(SAME, padding=(3, 3, 3, 3)), Algorithms()),
    "upsampled": (replace(SAME, upsample=True), Algorithms("phases4", "winograd4", "winograd4")),
    "stride": (replace(SAME, stride=(2, 2), padding=(0, 1, 0, 1)), Algorithms()),
    "strides": (replace(SAME, stride=(1, 2)), Algorithms()),
    "plain": (SAME, Algorithms(of_input="plain")),
    "1x1": (ConvSpec(12, 16), Algorithms()),
    "5x4": (ConvSpec(12, 16, (5, 4), padding=(2, 2, 1, 2), silu=True), Algorithms()),
}
# Which tensors there are besides x and the weight, by name.
GIVEN = {
    "nothing": (),
    "norm": ("gain", "offset", "bias"),
    "norm without parameters": ("norm",),
    "adaptive norm": ("gain", "offset", "norm_scale", "norm_shift"),
    "one row for all": ("gain", "norm_scale", "norm_shift", "emb", "one row"),
    "additions": ("bias", "emb", "residual"),
    "skip": ("skip", "gain", "offset", "bias", "residual"),
    "skip alone": ("skip",),
}


def tensors(spec, given, images=3, size=(6, 7), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    k, c = spec.filters, spec.channels
    of_x = 10 if "skip" in given else c
    rows = 1 if "one row" in given else images
    made = {"x": draw(images, of_x, *size) + 0.5, "weight": draw(*spec.weight) * 0.2}
    shapes = {
        "bias": (k,), "gain": (c,), "offset": (c,), "norm_scale": (rows, c),
        "norm_shift": (rows, c), "emb": (rows, k), "skip": (images, c - of_x, *size),
        "residual": (images, k, *spec.output_size(size)),
    }  # fmt: skip
    return made | {name: draw(*shapes[name]) for name in given if name in shapes}


def call_of(spec, algorithms, given, scale=1.0):
    norm = {"gain", "norm"} & set(given)
    return NormConv2d(spec, GROUPS if norm else 0, 1e-5, scale, algorithms)


def differentiated(call, values, weights):
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    rest = dict(leaves)
    y, statistics = norm_conv2d(call, rest.pop("x"), rest.pop("weight"), **rest)
    (y.double() * weights).sum().backward()
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}, statistics


def assert_close(found, exact, bound):
    for name, oracle in exact.items():
        scale = max(oracle.norm().item(), 1e-2)
        error = (found[name].double() - oracle).norm().item() / scale
        assert error <= bound, f"{name}: {error:.3g}"
        assert found[name].shape == oracle.shape


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", SPECS)
def test_gradients(name, given):
    spec, algorithms = SPECS[name]
    spec = replace(spec, statistics=True)
    call = call_of(spec, algorithms, GIVEN[given], scale=0.7)
    exact = tensors(spec, GIVEN[given])
    weights = torch.randn(3, 12, *spec.output_size((6, 7)), dtype=torch.float64)
    wanted, of_y = differentiated(call, exact, weights)
    found, statistics = differentiated(call, {n: v.float() for n, v in exact.items()}, weights)
    assert_close(found, wanted, 2e-5)
    torch.testing.assert_close(statistics, of_y, atol=1e-4, rtol=1e-4)
    assert not statistics.requires_grad


@pytest.mark.parametrize("given", GIVEN)
def test_bfloat16_images_with_float32_parameters(given):
    """As under autocast: gradients have their tensors' dtypes."""
    spec, _ = SPECS["silu"]
    call = call_of(spec, Algorithms(), GIVEN[given])
    exact = tensors(spec, GIVEN[given])
    images = ("x", "skip", "residual", "emb")
    values = {n: v.to(torch.bfloat16 if n in images else torch.float32) for n, v in exact.items()}
    exact = {n: v.double() for n, v in values.items()}
    weights = torch.randn(3, 12, 6, 7, dtype=torch.float64)
    wanted, _ = differentiated(call, exact, weights)
    found, _ = differentiated(call, values, weights)
    for name, value in values.items():
        assert found[name].dtype == value.dtype
    assert_close(found, wanted, 2e-2)


@pytest.mark.parametrize("shape", [(12, 16), (12, 16, 1), (12, 16, 1, 1)])
def test_the_gradient_has_the_shape_of_the_weight(shape):
    """Those of linear layers and of one-dimensional convolutions have fewer dimensions."""
    spec, algorithms = SPECS["1x1"]
    values = tensors(spec, (), dtype=torch.float32)
    values["weight"] = values["weight"].view(shape)
    found, _ = differentiated(call_of(spec, algorithms, ()), values, 1.0)
    assert found["weight"].shape == shape


@pytest.mark.parametrize("given", ["norm", "skip", "one row for all"])
def test_gradcheck(given):
    """Of the formulas in plain PyTorch, which compute float64."""
    spec = ConvSpec(4, 4, (3, 3), padding=(1, 1, 1, 1), silu=True)
    wanted = [name for name in GIVEN[given] if name != "skip"]
    values = tensors(spec, wanted, images=2, size=(3, 2))
    names = list(values)
    call = NormConv2d(spec, 2)

    def run(*leaves):
        rest = dict(zip(names, leaves, strict=True))
        return norm_conv2d(call, rest.pop("x"), rest.pop("weight"), **rest)[0]

    assert torch.autograd.gradcheck(run, [v.requires_grad_() for v in values.values()])


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "emb", "gain", "residual", "skip"])
def test_one_gradient_alone(wanted):
    spec, algorithms = SPECS["winograd"]
    given = ("skip", "gain", "offset", "bias", "emb", "residual")
    call = call_of(spec, algorithms, given)
    values = tensors(spec, given, dtype=torch.float32)
    whole, _ = differentiated(call, values, 1.0)
    leaf = values[wanted].clone().requires_grad_()
    rest = {**values, wanted: leaf}
    y, _ = norm_conv2d(call, rest.pop("x"), rest.pop("weight"), **rest)
    y.sum().backward()
    torch.testing.assert_close(leaf.grad, whole[wanted], rtol=1e-5, atol=1e-5)


def test_statistics_that_are_given_are_not_taken_again():
    spec, _ = SPECS["3x3"]
    values = tensors(spec, ("gain",), dtype=torch.float32)
    call = NormConv2d(spec, GROUPS)
    wrong = torch.zeros(3, 16, 2, dtype=torch.float64)
    wrong[..., 1] = 1.0
    y, _ = norm_conv2d(call, values["x"], values["weight"], statistics=[wrong])
    as_it_is, _ = norm_conv2d(NormConv2d(spec), values["x"], values["weight"])
    torch.testing.assert_close(y, as_it_is, atol=1e-3, rtol=1e-3)


def test_no_gradient_of_a_gradient():
    spec, algorithms = SPECS["3x3"]
    values = tensors(spec, (), dtype=torch.float32)
    x = values["x"].requires_grad_()
    y, _ = norm_conv2d(call_of(spec, algorithms, ()), x, values["weight"])
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_turned():
    """None where no convolution of stride 1 gives the gradient of the input."""
    assert turned(SAME) == ConvSpec(16, 12, (3, 3), padding=(1, 1, 1, 1))
    assert turned(SPECS["one side"][0]).padding == (2, 1, 0, 2)
    for name in ("stride", "strides", "wide padding"):
        assert turned(SPECS[name][0]) is None
