"""Consistency losses on Gaussian data, whose consistency function is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fastdiff
from fastdiff import losses, process, samplers, schedules
from fastdiff.losses.jumps import ddim_jump, levels

PATH = schedules.cosine(200)
MEAN, STD = 0.3, 0.6
T, S = torch.tensor([150, 90, 10, 60]), torch.tensor([140, 40, 0, -1])


def at(path, t, x):
    return (values.view(-1, *[1] * (x.ndim - 1)).to(x) for values in levels(path, t))


def marginal_std(alpha, sigma):
    return ((STD * alpha) ** 2 + sigma**2).sqrt()


def best_v(x_t, t, path=PATH):
    """The best prediction of v for images N(MEAN, STD^2)."""
    alpha, sigma = at(path, t, x_t)
    x0 = MEAN + alpha * STD**2 / marginal_std(alpha, sigma) ** 2 * (x_t - alpha * MEAN)
    return (alpha * x_t - x0) / sigma


def moved(x_t, t, s, path=PATH):
    """Where the probability-flow ODE leads: the standardised value stays what it is."""
    (alpha, sigma), (alpha_s, sigma_s) = at(path, t, x_t), at(path, s, x_t)
    z = (x_t - alpha * MEAN) / marginal_std(alpha, sigma)
    return alpha_s * MEAN + marginal_std(alpha_s, sigma_s) * z


def consistent(x_t, t):
    """The consistency function as a prediction of x_0: the end of the ODE at timestep 0, over
    alpha_0."""
    return moved(x_t, t, torch.zeros_like(t)) / PATH.alpha_t[0]


@pytest.fixture
def x0(generator):
    return MEAN + STD * torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def noise(generator):
    return torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)


def test_the_true_function_agrees_with_itself_along_the_ode(x0, noise):
    """With a teacher that follows the ODE exactly the loss is 0."""
    s = S.clamp(min=0)
    found = losses.consistency_loss(
        PATH, consistent, consistent, x0, T, s, noise,
        form=losses.prediction_form(PATH), teacher=moved,
    )  # fmt: skip
    assert found.abs().max() < 1e-12
    wrong = losses.consistency_loss(
        PATH, consistent, lambda x, t: consistent(x, t) + 0.5, x0, T, s, noise,
        form=losses.prediction_form(PATH), teacher=moved, huber=0.0,
    )  # fmt: skip
    torch.testing.assert_close(wrong, torch.full_like(wrong, 0.5))


def test_ddim_follows_the_ode_to_first_order(x0, noise):
    """The error of a jump falls with the square of its length."""
    path = schedules.cosine(3200)
    errors = []
    for length in (64, 32, 16):
        t = torch.full((4,), 1600)
        x_t = process.q_sample(path, x0, t, noise)
        jump = ddim_jump(path, lambda x, t: best_v(x, t, path), "v", x_t, t, t - length)
        errors.append((jump - moved(x_t, t, t - length, path)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_the_last_jump_is_the_predicted_image(x0, noise):
    x_t = process.q_sample(PATH, x0, T, noise)
    found = ddim_jump(PATH, lambda x, t: x0, "x0", x_t, T, torch.full_like(T, -1))
    torch.testing.assert_close(found, x0)


def test_without_a_teacher_both_have_the_same_noise(x0, noise):
    """Against the definition, with networks that return what they are given."""
    seen = []

    def network(x, t):
        seen.append((x, t))
        return x

    of_x, of_output = form = losses.karras_form(PATH, 0.5)
    found = losses.consistency_loss(
        PATH, network, network, x0, T, S, noise, form=form, huber=0.01
    )  # fmt: skip
    (x_s, s), (x_t, t) = seen
    assert (s.tolist(), t.tolist()) == (S.clamp(min=0).tolist(), T.tolist())
    torch.testing.assert_close(x_t, process.q_sample(PATH, x0, T, noise))
    torch.testing.assert_close(x_s, process.q_sample(PATH, x0, s, noise))
    f_t, f_s = (x * (of_x + of_output)[at].view(-1, 1, 1, 1) for x, at in ((x_t, T), (x_s, s)))
    f_s[3] = x0[3]  # s = -1: the image itself
    apart = (f_t - f_s).square().mean((1, 2, 3))
    torch.testing.assert_close(found, (apart + 0.01**2).sqrt() - 0.01)


def test_only_the_network_in_training_has_a_gradient(x0, noise):
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    other = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = losses.consistency_loss(
        PATH, lambda x, t: weight * x, lambda x, t: other * x, x0, T, S, noise,
        form=losses.prediction_form(PATH),
    )  # fmt: skip
    loss.sum().backward()
    assert weight.grad.isfinite()
    assert weight.grad != 0
    assert other.grad is None


@pytest.mark.parametrize("huber", [0.0, 1e-3])
def test_the_gradient_of_no_distance_is_zero(x0, noise, huber):
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses.consistency_loss(
        PATH, lambda x, t: weight * x0, lambda x, t: x0, x0, T, S, noise,
        form=losses.prediction_form(PATH), huber=huber,
    ).sum().backward()  # fmt: skip
    assert weight.grad == 0


def test_the_forms_are_those_of_the_samplers(generator):
    """A sampler with one step gives f at its first level, and no noise is left."""
    x = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    network = lambda x, t: 0.3 * x.sin()  # noqa: E731
    path = schedules.linear(100)
    cases = (
        (losses.karras_form(path, 0.4), {"name": "consistency", "sigma_data": 0.4}),
        (losses.prediction_form(path, "v"), {"name": "consistency", "prediction": "v"}),
        (losses.lcm_form(path, "eps"), {"name": "lcm", "prediction": "eps", "original_steps": 50}),
    )
    for (of_x, of_output), options in cases:
        sampler = samplers.make(options.pop("name"), path, 1, **options)
        found = fastdiff.sample(network, sampler, x.shape, x_T=x, progress=False, dtype=x.dtype)
        t = int(sampler.timesteps[0])
        torch.testing.assert_close(found, of_x[t] * x + of_output[t] * network(x, t))


def test_probabilities_of_a_log_normal_level():
    path = schedules.linear(1000)
    grid = torch.tensor([0, 10, 200, 999])
    found = losses.discretized_log_normal(path, grid)
    ratios = (path.sigma_t / path.alpha_t)[grid].log().tolist()
    normal = [0.5 * (1 + math.erf((r + 1.1) / (2 * math.sqrt(2)))) for r in ratios]
    total = normal[-1] - normal[0]
    wanted = [(b - a) / total for a, b in itertools.pairwise(normal)]
    torch.testing.assert_close(found.tolist(), wanted)
    with pytest.raises(ValueError, match="timesteps must be"):
        losses.discretized_log_normal(path, grid.flip(0))
    with pytest.raises(ValueError, match="at least two timesteps"):
        losses.discretized_log_normal(path, grid[:1])


def test_the_number_of_intervals_doubles_in_stages():
    """8 stages from 10 to 1280 intervals, of equal length."""
    found = [losses.intervals_at(step, 800) for step in range(800)]
    assert found == sorted(found)
    assert [found.count(10 * 2**i) for i in range(8)] == [100] * 8
    assert losses.intervals_at(799, 800, 10, 40) == 40
    with pytest.raises(ValueError, match="wanted 0 <= step < steps"):
        losses.intervals_at(800, 800)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        pytest.param({"s": T}, ValueError, "s must be as many timesteps", id="no jump"),
        pytest.param({"s": S[:2]}, ValueError, "s must be as many timesteps", id="too few"),
        pytest.param({"huber": -1.0}, ValueError, "huber must be at least 0", id="huber"),
        pytest.param({"teacher": lambda x, t, s: x[:1]}, ValueError, "teacher's", id="teacher"),
        pytest.param({"x0": torch.zeros(4, 1).long()}, TypeError, "floating", id="integers"),
    ],
)
def test_refusals(x0, noise, given, error, message):
    call = {"x0": x0, "t": T, "s": S, "noise": noise, **given}
    with pytest.raises(error, match=message):
        losses.consistency_loss(
            PATH, consistent, consistent, call.pop("x0"), call.pop("t"), call.pop("s"),
            call.pop("noise"), form=losses.prediction_form(PATH), **call,
        )  # fmt: skip
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        losses.karras_form(PATH, 0.0)
    with pytest.raises(IndexError, match=r"timesteps must lie in -1..199"):
        levels(PATH, torch.tensor([200]))
    with pytest.raises(TypeError, match="must be int64"):
        levels(PATH, torch.tensor([1.0]))
