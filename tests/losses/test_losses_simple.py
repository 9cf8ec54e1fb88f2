"""The simple loss: the error of a prediction, in every parametrisation, dtype and layout."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from gaussian_data import GaussianData

from fastdiff import losses, process, schedules

LINEAR = schedules.linear(1000)
FLOW = schedules.flow(1000)
T3 = torch.tensor([0, 400, 999])


def images(generator, dtype=torch.float64):
    return torch.randn(3, 2, 5, 3, generator=generator, dtype=torch.float64).to(dtype)


def constant(x_t, t):
    return torch.full_like(x_t, 0.25)


TARGETS = {
    "eps": lambda x0, eps, alpha, sigma: eps,
    "x0": lambda x0, eps, alpha, sigma: x0,
    "v": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    "score": lambda x0, eps, alpha, sigma: -eps / sigma,
    "flow": lambda x0, eps, alpha, sigma: eps - x0,
}


@pytest.mark.parametrize("path", [LINEAR, FLOW], ids=["linear", "flow"])
@pytest.mark.parametrize("kind", process.KINDS)
def test_it_is_the_mean_squared_error_of_the_prediction(kind, path, generator):
    x0, noise = images(generator), images(generator)
    found = losses.simple_loss(path, constant, x0, T3, noise, kind=kind)
    assert found.dtype == torch.float64
    for n, t in enumerate(T3.tolist()):
        alpha, sigma = path.alpha_t[t].item(), path.sigma_t[t].item()
        wanted = TARGETS[kind](x0[n], noise[n], alpha, sigma)
        error = math.fsum((value - 0.25) ** 2 for value in wanted.flatten().tolist()) / 30
        assert found[n].item() == pytest.approx(error, rel=1e-13)


def test_the_model_sees_the_noised_image_its_time_and_its_arguments(generator):
    x0, noise, labels = images(generator), images(generator), torch.tensor([4, 5, 6])
    seen = {}

    def model(x_t, t, class_labels, scale):
        seen.update(x_t=x_t, t=t, class_labels=class_labels, scale=scale)
        return noise

    found = losses.simple_loss(LINEAR, model, x0, T3, noise, class_labels=labels, scale=2)
    assert not found.any()
    assert torch.equal(seen["x_t"], process.q_sample(LINEAR, x0, T3, noise))
    assert torch.equal(seen["t"], T3)
    assert seen["class_labels"] is labels
    assert seen["scale"] == 2


@pytest.mark.parametrize(
    "wrap", [lambda x: (x, 1), lambda x: SimpleNamespace(sample=x)], ids=["tuple", "object"]
)
def test_outputs_that_hold_the_prediction(wrap, generator):
    x0, noise = images(generator), images(generator)
    plain = losses.simple_loss(LINEAR, constant, x0, T3, noise)
    found = losses.simple_loss(LINEAR, lambda x, t: wrap(constant(x, t)), x0, T3, noise)
    assert torch.equal(found, plain)


def test_weights_multiply_the_loss_of_their_timestep(generator):
    x0, noise = images(generator), images(generator)
    weight = torch.linspace(1, 3, 1000, dtype=torch.float64)
    plain = losses.simple_loss(LINEAR, constant, x0, T3, noise)
    found = losses.simple_loss(LINEAR, constant, x0, T3, noise, weight=weight)
    torch.testing.assert_close(found, plain * weight[T3], rtol=1e-14, atol=0)


def test_the_best_model_is_left_with_the_variance_of_x0_given_x_t():
    data = GaussianData(0.3, 0.7)
    for step in (0, 50, 500, 999):
        t = torch.full((9,), step)
        found = losses.simple_loss(LINEAR, data.model(LINEAR), data.x0, t, data.noise, kind="x0")
        expected = data.expectation(found)
        torch.testing.assert_close(expected, data.mmse(LINEAR)[step], rtol=1e-11, atol=0)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_gradients(kind, generator):
    x0, noise, slope = images(generator), images(generator), images(generator).requires_grad_()
    weight = losses.min_snr(LINEAR, kind)

    def loss(slope):
        def model(x_t, t):
            return slope * x_t + slope**2

        return losses.simple_loss(LINEAR, model, x0, T3, noise, kind=kind, weight=weight)

    assert torch.autograd.gradcheck(loss, slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_images_have_a_target_that_is_not_rounded(dtype, generator):
    """With a prediction in float32 the loss is that of float64 to float32's digits."""
    x0, noise = images(generator, dtype), images(generator, dtype)
    wide = losses.simple_loss(LINEAR, constant, x0.double(), T3, noise.double(), kind="v")
    found = losses.simple_loss(
        LINEAR, lambda x_t, t: constant(x_t, t).float(), x0, T3, noise, kind="v"
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wide, rtol=1e-6, atol=0)


def test_channels_last_and_no_images(generator):
    x0, noise = images(generator), images(generator)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (x0, noise)]
    found = losses.simple_loss(LINEAR, constant, last[0], T3, last[1])
    plain = losses.simple_loss(LINEAR, constant, x0, T3, noise)
    torch.testing.assert_close(found, plain, rtol=1e-14, atol=0)
    empty = losses.simple_loss(LINEAR, constant, x0[:0], T3[:0], noise[:0])
    assert empty.shape == (0,)


X = torch.zeros(3, 2, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"kind": "mean"}, ValueError, "unknown prediction kind 'mean'", id="kind"),
        pytest.param({"x0": X.long()}, TypeError, "floating point, got torch.int64", id="x0"),
        pytest.param(
            {"x0": torch.zeros(3), "noise": torch.zeros(3)}, ValueError, r"\[N, C, \.\.\.\], got",
            id="no channels",
        ),
        pytest.param({"t": T3.int()}, TypeError, "int64, got torch.int32", id="t"),
        pytest.param({"t": T3 + 1}, IndexError, r"0\.\.999 .* from 1 to 1000", id="t too large"),
        pytest.param({"noise": X[:1]}, ValueError, "shape of x0", id="noise"),
        pytest.param(
            {"model": lambda x, t: x[:, :1]}, ValueError,
            r"fixed variance .* must return \(3, 2, 4, 4\), got \(3, 1, 4, 4\)", id="output",
        ),
        pytest.param({"model": lambda x, t: None}, TypeError, "got NoneType", id="no output"),
        pytest.param({"weight": torch.ones(9)}, ValueError, r"\[1000\].* got \(9,\)", id="weight"),
        pytest.param({"weight": torch.ones(1000).int()}, TypeError, "int32", id="weight's dtype"),
        pytest.param({"weight": [1.0]}, TypeError, "got list", id="weights in a list"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    given = {"schedule": LINEAR, "model": constant, "x0": X, "t": T3, "noise": X, **change}
    with pytest.raises(error, match=message):
        losses.simple_loss(**given)
