"""DPM-Solver with steps to a tolerance."""

from __future__ import annotations

import math

import pytest
import torch
from sigma_oracles import midpoint_step, straight, third_order_step

import fastdiff.k_diffusion as K
from fastdiff.common.errors import StuckError

pytestmark = pytest.mark.usefixtures("one_thread")

HIGH, LOW, STD = 10.0, 0.05, 0.5


def gaussian(x, sigma):
    """The best denoiser of images from N(0, STD^2)."""
    variance = sigma.view(-1, *[1] * (x.ndim - 1)) ** 2
    return x * STD**2 / (STD**2 + variance)


def solution(x, high=HIGH, low=LOW):
    """Where the probability-flow ODE takes x: its place in the distribution stays."""
    return x * math.sqrt((STD**2 + low**2) / (STD**2 + high**2))


def begin(shape=(2, 3, 4, 4)):
    generator = torch.Generator().manual_seed(0)
    return HIGH * torch.randn(shape, generator=generator, dtype=torch.float64)


def run(x, **options):
    return K.sample_dpm_adaptive(gaussian, x, LOW, HIGH, disable=True, return_info=True, **options)


def by_formula(x, order, *, rtol, atol, h, pid=(0.0, 1.0, 0.0), safety=0.81):
    """The run in plain words: a step in two orders, their difference, and the next step's size."""

    def f(y, sigma):
        return gaussian(y, torch.full((len(y),), sigma, dtype=y.dtype))

    def second_order_step(f, x, a, b):
        """Lu et al. 2022, algorithm 1, with r_1 = 1 / 3, for alpha = 1."""
        inner = a ** (2 / 3) * b ** (1 / 3)
        first = (x - f(x, a)) / a
        y = x + (inner - a) * first
        return x + (b - a) * (first + 1.5 * ((y - f(y, inner)) / inner - first))

    low_step, high_step = {
        2: (straight, midpoint_step), 3: (second_order_step, third_order_step)
    }[order]  # fmt: skip
    t, end, before, errors, steps = -math.log(HIGH), -math.log(LOW), x, None, []
    p, i, d = pid
    while t < end - 1e-5:
        after = min(end, t + h)
        a, b = math.exp(-t), math.exp(-after)
        low, high = low_step(f, x, a, b), high_step(f, x, a, b)
        scale = torch.maximum(torch.tensor(atol), rtol * torch.maximum(low.abs(), before.abs()))
        inverse = 1 / (((low - high) / scale).square().mean().sqrt().item() + 1e-8)
        errors = errors or [inverse] * 2
        factor = inverse ** ((p + i + d) / order) * errors[0] ** (-(p + 2 * d) / order)
        factor = 1 + math.atan(factor * errors[1] ** (d / order) - 1)
        h *= factor
        steps.append(factor >= safety)
        if steps[-1]:
            t, x, before, errors = after, high, low, [inverse, errors[0]]
    return x, steps


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"rtol": 0.05, "atol": 0.0078, "h_init": 0.05},
        {"rtol": 1e-3, "atol": 1e-3, "h_init": 3.0},  # whose first steps are rejected
        {"rtol": 0.01, "atol": 0.01, "h_init": 0.5, "pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1},
    ],
    ids=["defaults", "rejected", "pid"],
)
def test_the_formula(order, options):
    x = begin()
    pid = (options.get("pcoeff", 0.0), options.get("icoeff", 1.0), options.get("dcoeff", 0.0))
    plain = {"rtol": options["rtol"], "atol": options["atol"], "h": options["h_init"]}
    wanted, steps = by_formula(x, order, **plain, pid=pid)
    found, info = run(x, order=order, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert (info["n_accept"], info["n_reject"]) == (steps.count(True), steps.count(False))
    assert info["steps"] == len(steps)
    # Where a step is rejected, what the model said of its beginning is used again.
    assert info["nfe"] == order * len(steps) - info["n_reject"]
    assert info["n_reject"] > 0 or options["h_init"] < 3


@pytest.mark.parametrize("order", [2, 3])
def test_a_smaller_tolerance_is_nearer_to_the_solution(order):
    x, errors, evaluations = begin(), [], []
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        found, info = run(x, order=order, rtol=tolerance, atol=tolerance)
        errors.append((found - solution(x)).abs().max().item())
        evaluations.append(info["nfe"])
    assert errors == sorted(errors, reverse=True)
    assert evaluations == sorted(evaluations)
    assert errors[-1] < 2e-3


def test_noise_keeps_the_distribution():
    """Of many pixels, with ancestral noise in every step."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, 200, 200, generator=generator, dtype=torch.float64)
    x = x * math.sqrt(HIGH**2 + STD**2)
    found, _ = run(
        x, eta=1.0, rtol=1e-2, atol=1e-3,
        noise_sampler=lambda a, b: torch.randn(x.shape, generator=generator, dtype=x.dtype),
    )  # fmt: skip
    # Four standard errors of a standard deviation of 40,000 values, and the bias of the steps.
    assert found.std().item() == pytest.approx(math.hypot(STD, LOW), rel=0.02 + 0.014)


def test_callbacks():
    seen = []
    _, info = run(begin(), callback=seen.append)
    assert [each["i"] for each in seen] == list(range(info["steps"]))
    assert seen[-1]["sigma"].item() == pytest.approx(LOW)
    assert seen[-1]["n_accept"] == info["n_accept"]
    assert all(each["error"] > 0 and each["h"] > 0 for each in seen)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"order": 4}, ValueError, "unknown order 4, wanted one of 2, 3"),
        ({"sigma_min": 0.0}, ValueError, "wanted 0 < sigma_min < sigma_max, got 0 and 10"),
        ({"sigma_min": 20.0}, ValueError, "got 20 and 10"),
        ({"rtol": 0.0}, ValueError, "rtol must be positive"),
        ({"atol": math.nan}, ValueError, "atol must be positive"),
        ({"h_init": -0.1}, ValueError, "h_init must be positive"),
        ({"eta": -1.0}, ValueError, "eta must not be negative"),
        ({"model": lambda x, s: x * math.nan}, FloatingPointError, "not finite at sigma = 10"),
        ({"model": lambda x, s: torch.randn_like(x), "rtol": 1e-9, "atol": 1e-9}, StuckError,
         "too small: take a larger tolerance"),
        ({"x": torch.ones(2, 3).long()}, TypeError, "x must be a floating point tensor"),
    ],
    ids=["order", "zero", "crossed", "rtol", "atol", "h_init", "eta", "NaN", "stuck", "x"],
)  # fmt: skip
def test_refusals(arguments, error, message):
    given = {"model": gaussian, "x": begin(), "sigma_min": LOW, "sigma_max": HIGH, "disable": True}
    with pytest.raises(error, match=message):
        K.sample_dpm_adaptive(**{**given, **arguments})
    if "order" not in arguments and not arguments.keys() & {"rtol", "atol", "h_init", "model"}:
        extra = {"eta": 1.5} if "eta" in arguments else {}
        with pytest.raises(error):
            K.sample_dpm_fast(**{**given, **arguments, "n": 5, **extra})


@pytest.mark.parametrize("n", [0, -1, 2.5, True], ids=str)
def test_dpm_fast_takes_a_number_of_evaluations(n):
    with pytest.raises((TypeError, ValueError), match="n must be"):
        K.sample_dpm_fast(gaussian, begin(), LOW, HIGH, n, disable=True)
