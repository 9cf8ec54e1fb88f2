"""Weightings: published formulas, and one loss whichever prediction it is put on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from gaussian_data import LN2, GaussianData

from fastdiff import losses, process, schedules
from fastdiff.losses import weights
from fastdiff.schedules import GaussianPath

T = 1000
LINEAR = schedules.linear(T)
COSINE = schedules.cosine(T)
ZERO_SNR = schedules.rescale_zero_terminal_snr(LINEAR)
SNR = LINEAR.alphas_cumprod / (1 - LINEAR.alphas_cumprod)


class Exploding(GaussianPath):
    """alpha^2 + sigma^2 and alpha + sigma vary along the path."""

    sigma_t = torch.logspace(-2, 1.5, T, dtype=torch.float64)
    alpha_t = torch.ones_like(sigma_t)


class Straight(GaussianPath):
    """Rectified flow's path, short of its end without signal."""

    sigma_t = torch.arange(1, T + 1, dtype=torch.float64) / (T + 1)
    alpha_t = 1 - sigma_t


PATHS = [
    pytest.param(LINEAR, id="linear"),
    pytest.param(Straight(), id="straight"),
    pytest.param(Exploding(), id="exploding"),
]
PAIRS = [
    pytest.param(*pair, id=f"{pair[0]}-to-{pair[1]}")
    for pair in itertools.product(process.KINDS, process.KINDS)
]
CONVERT = {
    "eps": process.to_eps,
    "x0": process.to_x0,
    "v": process.to_v,
    "score": process.to_score,
    "flow": process.to_flow,
}


def same(found, wanted, rtol=1e-12):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("from_kind", "to_kind"), PAIRS)
def test_converted_weights_leave_the_loss_the_same(from_kind, to_kind, path, generator):
    """The same wrong model, read as a prediction of one kind and of the other."""
    x0, noise = (
        torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    t = torch.tensor([0, 30, 500, 999])
    table = torch.rand(T, generator=generator, dtype=torch.float64) + 0.5

    def model(kind):
        return lambda x_t, t: CONVERT[kind](path, x_t, t, torch.tanh(x_t) - 0.3, "v")

    given = losses.simple_loss(path, model(from_kind), x0, t, noise, kind=from_kind, weight=table)
    weight = losses.convert(path, table, from_kind, to_kind)
    found = losses.simple_loss(path, model(to_kind), x0, t, noise, kind=to_kind, weight=weight)
    # At the ends of the path signal or noise is 0.001 of x_t, and predictions lose 3 digits twice.
    same(found, given, rtol=1e-8)
    assert weight.dtype == torch.float64
    same(losses.convert(path, weight, to_kind, from_kind), table)


def test_factors_between_the_errors():
    """x0 error = eps error / SNR, and the v error is SNR + 1 times the x0 error."""
    ones = torch.ones(T, dtype=torch.float64)
    same(losses.convert(LINEAR, ones, "x0", "eps"), 1 / SNR, rtol=1e-10)
    same(losses.convert(LINEAR, ones, "v", "x0"), SNR + 1, rtol=1e-10)
    same(losses.convert(LINEAR, ones, "score", "eps"), 1 / (1 - LINEAR.alphas_cumprod))
    path = Exploding()
    power = path.alpha_t**2 + path.sigma_t**2
    same(losses.convert(path, ones, "v", "x0"), (power / path.sigma_t) ** 2)
    same(losses.convert(path, ones, "flow", "x0"), (1 + path.alpha_t / path.sigma_t) ** 2)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        pytest.param(losses.snr(LINEAR), SNR, id="snr"),
        pytest.param(losses.snr(LINEAR, "eps"), torch.ones_like(SNR), id="snr, eps"),
        pytest.param(losses.snr(LINEAR, "v"), SNR / (SNR + 1), id="snr, v"),
        pytest.param(losses.min_snr(LINEAR), SNR.clamp(max=5) / SNR, id="min-snr"),
        pytest.param(losses.min_snr(LINEAR, "x0"), SNR.clamp(max=5), id="min-snr, x0"),
        pytest.param(
            losses.min_snr(LINEAR, "v", gamma=1.0), SNR.clamp(max=1) / (SNR + 1), id="min-snr, v"
        ),
        pytest.param(losses.p2(LINEAR), 1 - LINEAR.alphas_cumprod, id="p2"),
        pytest.param(losses.p2(LINEAR, k=2.0, gamma=0.5), (2 + SNR) ** -0.5, id="p2, options"),
        pytest.param(losses.p2(LINEAR, "x0", gamma=0.0), SNR, id="p2, x0"),
    ],
)
def test_published_weights(found, wanted):
    assert found.dtype == torch.float64
    same(found, wanted, rtol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_edm(path):
    """lambda = (sigma^2 + sd^2) / (sigma sd)^2 of the denoiser's error."""
    sigma = path.sigma_t / path.alpha_t
    for sd in (0.5, 1.3):
        wanted = (sigma**2 + sd**2) / (sigma * sd) ** 2
        same(losses.edm(path, sigma_data=sd), wanted)
        # On the raw network's output F, with c_out = sigma sd / sqrt(sigma^2 + sd^2), it is 1.
        same(losses.edm(path, sigma_data=sd) * (sigma * sd) ** 2 / (sigma**2 + sd**2), sigma**0)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, ZERO_SNR], ids=["linear", "cosine", "zero"])
def test_vlb_is_half_the_fall_of_snr(schedule):
    found = losses.vlb(schedule, "x0")[1:]
    # Differences of SNR lose digits where it hardly falls.
    torch.testing.assert_close(found, -schedule.snr.diff() / 2, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", process.KINDS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_vlb_turns_the_error_into_the_bound(kind, variance, generator):
    """Two models differ in L_t by the weight times the difference of their errors."""
    x0, noise = (
        torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    t = torch.tensor([0, 1, 40, 700])
    weight = losses.vlb(LINEAR, kind, variance=variance)
    errors, bounds = [], []
    for wrong in (0.2, 0.7):

        def model(x_t, t, wrong=wrong):
            return CONVERT[kind](LINEAR, x_t, t, wrong * torch.tanh(x_t), "x0")

        errors.append(losses.simple_loss(LINEAR, model, x0, t, noise, kind=kind, weight=weight))
        bounds.append(
            losses.vlb_loss(
                LINEAR, model, x0, t, noise, kind=kind, variance=variance, discrete=False
            )
        )
    same((bounds[1] - bounds[0]) * LN2, errors[1] - errors[0], rtol=1e-7)
    rest = bounds[0] * LN2 - errors[0]
    ratio = LINEAR.posterior_variance[t] / LINEAR.betas[t]
    of_variances = (ratio - 1 - ratio.log()) / 2 if variance == "fixed_large" else 0 * ratio
    of_variances[0] = math.log(2 * math.pi * LINEAR.posterior_variance[1]) / 2
    torch.testing.assert_close(rest, of_variances, rtol=1e-9, atol=1e-9)


def test_linear_betas_never_reach_the_entropy():
    """With fixed_small the gap of the best model tends to (1 - log 2 + Euler's constant) / 2.

    However many the steps, the first ones halve the noise, or change it by a third, a quarter ...;
    those with index t cost (1/t - log(1 + 1/t)) / 2, and the decoder (1 - log 2) / 2.
    """
    data = GaussianData(0.3, 0.5)
    gaps = []
    for steps in (4000, 16000, 64000):
        schedule = schedules.linear(steps, 0.1 / steps, 20 / steps)
        bound = losses.vlb(schedule, "x0") @ data.mmse(schedule) + data.prior(schedule)
        decoder = math.log(2 * math.pi * schedule.posterior_variance[1]) / 2
        gaps.append((bound + decoder).item() - data.entropy)
    limit = (1 - LN2 + 0.5772156649015329) / 2
    left = [gap - limit for gap in gaps]
    # log T / T: of four times the steps a third is left, and less as T grows.
    assert 0.25 < left[2] / left[1] < left[1] / left[0] < 0.35
    assert 0 < left[2] < 0.005


def test_weights_at_zero_terminal_snr():
    last = {
        "snr": {"x0": 0.0, "eps": 1.0, "v": 0.0},
        "min_snr": {"x0": 0.0, "eps": 1.0, "v": 0.0},
        "p2": {"x0": 0.0, "eps": 1.0, "v": 0.0},
        "edm": {"x0": 4.0, "v": 4.0},
    }
    for name, of_kind in last.items():
        for kind, value in of_kind.items():
            found = losses.weighting(ZERO_SNR, kind, name)
            assert bool(torch.isfinite(found).all())
            assert found[-1] == value
    for name in ("edm", "vlb"):
        with pytest.raises(ValueError, match=r"zero signal-to-noise ratio \(t = 999\)"):
            losses.weighting(ZERO_SNR, "eps", name)


def test_by_name():
    for name, function in weights.NAMES.items():
        for kind in process.KINDS:
            assert torch.equal(losses.weighting(LINEAR, kind, name), function(LINEAR, kind))
    found = losses.weighting(LINEAR, "v", "min_snr", gamma=3.0)
    assert torch.equal(found, losses.min_snr(LINEAR, "v", gamma=3.0))


ONES = torch.ones(T, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: losses.weighting(LINEAR, "eps", "soft"), ValueError,
            "unknown weighting 'soft', wanted one of snr, min_snr, p2, edm, vlb", id="name",
        ),
        pytest.param(
            lambda: losses.weighting(LINEAR, "mean", "p2"), ValueError,
            "unknown prediction kind 'mean'", id="kind",
        ),
        pytest.param(
            lambda: losses.weighting(LINEAR, "eps", "p2", sigma_data=1), TypeError, "sigma_data",
            id="option",
        ),
        pytest.param(lambda: losses.min_snr(LINEAR, gamma=0), ValueError, "got 0", id="gamma"),
        pytest.param(lambda: losses.p2(LINEAR, k=-1), ValueError, "k must be positive", id="k"),
        pytest.param(lambda: losses.p2(LINEAR, gamma=-1), ValueError, "at least 0", id="negative"),
        pytest.param(lambda: losses.edm(LINEAR, sigma_data=0), ValueError, "got 0", id="data"),
        pytest.param(
            lambda: losses.vlb(schedules.flow(9)), TypeError, "NoiseSchedule, got FlowSchedule",
            id="flow",
        ),
        pytest.param(
            lambda: losses.vlb(LINEAR, variance="learned"), ValueError,
            "unknown fixed variance 'learned'", id="learned variance",
        ),
        pytest.param(
            lambda: losses.convert(LINEAR, ONES[1:], "x0", "v"), ValueError,
            r"\[1000\], got \(999,\)", id="table",
        ),
        pytest.param(
            lambda: losses.convert(LINEAR, ONES.long(), "x0", "v"), TypeError, "int64", id="dtype"
        ),
        pytest.param(
            lambda: losses.convert(LINEAR, ONES, "x0", "mean"), ValueError, "'mean'", id="to"
        ),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
