"""Gradients, dropout and the modes that switch them: eager's, whatever was compiled before."""

from __future__ import annotations

import copy

import pytest
import torch
from judging import assert_as_eager, compiled
from models import inputs, make
from small import small_inputs, small_net


def gradients(net, model, arguments, seed=0):
    """Output and gradients with respect to the floating-point arguments and all weights."""
    torch.manual_seed(seed)  # of the dropout
    arguments = [a.clone().requires_grad_(a.is_floating_point()) for a in arguments]
    out = net(*arguments)
    wanted = [a for a in arguments if a.requires_grad]
    wanted += [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]


def assert_same_gradients(net, model, arguments, **options):
    found = gradients(net, model, arguments, **options)
    expected = gradients(model, model, arguments, **options)
    largest = max(b.abs().max() for b in expected)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        scale = b.abs().max().clamp_min(1e-3 * largest)  # that of the keys' bias is zero
        error = ((a - b).abs().max() / scale).item()
        assert error <= 1e-4, f"{index}: {error:.3g} of {scale:.3g}"


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_gradients(train):
    model = small_net(dropout=0.3).train(train)
    net = compiled(model)
    for seed in (0, 1):
        assert_same_gradients(net, model, small_inputs(), seed=seed)


@pytest.mark.parametrize("name", ["guided", "fastdiff"])
def test_gradients_of_models(name):
    model = make(name).train()
    args, _ = inputs(name, 2, (4, 6))
    assert_same_gradients(compiled(model), model, args)


def test_frozen_weights_and_an_input_that_wants_a_gradient():
    """Guidance differentiates with respect to the image alone."""
    model = small_net().requires_grad_(False)
    net, arguments = compiled(model), small_inputs()
    assert_same_gradients(net, model, arguments)


def test_only_one_weight_wants_a_gradient():
    model = small_net().requires_grad_(False)
    model.time2.bias.requires_grad_()
    net, (x, emb) = compiled(model), small_inputs()
    found = torch.autograd.grad(net(x, emb).square().sum(), model.time2.bias)
    expected = torch.autograd.grad(model(x, emb).square().sum(), model.time2.bias)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_gradient_enabled_but_wanted_by_nothing():
    model = small_net().requires_grad_(False)
    net, arguments = compiled(model), small_inputs()
    out = net(*arguments)
    assert not out.requires_grad
    assert_as_eager(out, model, arguments)


def test_modes_in_turn():
    """Each of them finds its own graph, however often they change."""
    model = small_net(dropout=0.3)
    net, arguments = compiled(model), small_inputs()
    for _ in range(2):
        with torch.no_grad():
            out = net(*arguments)
        assert not out.requires_grad
        assert_as_eager(out, model, arguments)
        assert_same_gradients(net, model, arguments)
        with torch.inference_mode():
            out = net(*arguments)
        assert out.is_inference()
        assert_as_eager(out, model, arguments)
        model.train()
        assert_same_gradients(net, model, arguments)
        with torch.no_grad():
            assert_same_dropout(net, model, arguments)
        model.eval()


def assert_same_dropout(net, model, arguments):
    found = []
    for call in (net, model):
        torch.manual_seed(3)
        found.append(call(*arguments))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert (found[0] - net(*arguments)).abs().max() > 1e-2  # other numbers, another result


def test_a_training_step_is_seen_by_inference():
    model = small_net()
    net, arguments = compiled(model), small_inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            assert_as_eager(net(*arguments), model, arguments)
        twin = copy.deepcopy(model)
        twin(*arguments).square().mean().backward()
        optimizer.zero_grad()
        net(*arguments).square().mean().backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)
        optimizer.step()


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_autocast(grad):
    """Its convolutions are bfloat16's, outside of it they are float32's."""
    model = small_net()
    net, arguments = compiled(model), small_inputs()
    with torch.set_grad_enabled(grad):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = net(*arguments), model(*arguments)
        outside = net(*arguments)
    assert found.dtype == expected.dtype == torch.bfloat16
    exact = model.double()(*(value.double() for value in arguments))
    limit = 2 * (expected - exact).abs().max() + 0.01
    assert (found - exact).abs().max() <= limit
    assert outside.dtype == torch.float32
    assert (outside - exact).abs().max() <= 1e-4 * exact.abs().max()


@torch.no_grad()
def test_batch_norm_in_training_mode():
    """Its running statistics move as in eager mode."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.SiLU(),
        torch.nn.Conv2d(16, 16, 3, padding=1),
    )  # fmt: skip
    twin, x = copy.deepcopy(model), small_inputs()[0]
    net = compiled(model)
    for train in (True, False, True):
        model.train(train), twin.train(train)
        torch.testing.assert_close(net(x), twin(x), atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
