"""Schedules against formulas written out here in plain Python, and against diffusers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import NoiseSchedule, losses, samplers, schedules, sde
from fastdiff.schedules import FlowSchedule, GaussianPath

T = 1000


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def linear_beta(t: int) -> float:
    return 1e-4 + (0.02 - 1e-4) * t / (T - 1)


def scaled_linear_beta(t: int) -> float:
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    return (low + (high - low) * t / (T - 1)) ** 2


def cosine_beta(t: int) -> float:
    def f(step: int) -> float:
        return math.cos((step / T + 0.008) / 1.008 * math.pi / 2) ** 2

    return min(1 - f(t + 1) / f(t), 0.999)


def sigmoid_beta(t: int) -> float:
    return 1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * t / (T - 1)))


def sigmoid_abar_beta(t: int) -> float:
    def abar(step: int) -> float:
        def curve(u: float) -> float:
            return 1 / (1 + math.exp(3 - 6 * u))

        return (curve(1) - curve(step / T)) / (curve(1) - curve(0))

    return min(1 - abar(t + 1) / abar(t), 0.999)


def shifted_cosine_beta(t: int) -> float:
    def abar(step: int) -> float:
        if step == 0:
            return 1.0
        first, last = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
        return math.cos(first + step / T * (last - first)) ** 2

    return 1 - abar(t + 1) / abar(t)


FORMULAS = {
    "linear": linear_beta,
    "scaled_linear": scaled_linear_beta,
    "cosine": cosine_beta,
    "shifted_cosine": shifted_cosine_beta,
    "sigmoid_betas": sigmoid_beta,
    "sigmoid_abar": sigmoid_abar_beta,
}
ALL = [pytest.param(name, id=name) for name in FORMULAS]


@pytest.mark.parametrize("name", ALL)
def test_betas_follow_the_formula(name):
    wanted = float64([FORMULAS[name](t) for t in range(T)])
    schedule = schedules.make(name, T)
    assert schedule.betas.dtype == torch.float64
    # Betas of the cosines are differences of numbers near 1.
    torch.testing.assert_close(schedule.betas, wanted, rtol=1e-11, atol=5e-16)


@pytest.mark.parametrize("name", ALL)
def test_cumulative_product_keeps_double_precision(name):
    schedule = schedules.make(name, T)
    logs = [math.log1p(-beta) for beta in schedule.betas.tolist()]
    wanted = float64([math.exp(math.fsum(logs[: t + 1])) for t in range(T)])
    torch.testing.assert_close(schedule.alphas_cumprod, wanted, rtol=2e-13, atol=0)


@pytest.mark.parametrize(
    ("name", "snr", "signal"),
    [
        pytest.param("linear", 4.036e-5, 0.006353, id="linear"),
        pytest.param("cosine", 2.429e-9, 4.928e-5, id="cosine"),
        pytest.param("scaled_linear", 0.004682, 0.068265, id="scaled_linear"),
    ],
)
def test_terminal_values_are_the_published_ones(name, snr, signal):
    """Lin et al. 2023 (arXiv:2305.08891), table 1."""
    schedule = schedules.make(name, T)
    assert schedule.snr[-1].item() == pytest.approx(snr, rel=5e-4)
    assert schedule.sqrt_alphas_cumprod[-1].item() == pytest.approx(signal, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "theirs", "rtol"),
    [
        # Their tables are float32 throughout, so the product of a thousand alphas has lost digits.
        pytest.param("linear", {"beta_schedule": "linear"}, 1e-5, id="linear"),
        pytest.param(
            "scaled_linear",
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            1e-5,
            id="scaled_linear",
        ),
        pytest.param("cosine", {"beta_schedule": "squaredcos_cap_v2"}, 1e-4, id="cosine"),
        pytest.param("sigmoid_betas", {"beta_schedule": "sigmoid"}, 1e-5, id="sigmoid"),
    ],
)
def test_tables_are_those_of_diffusers(name, theirs, rtol):
    scheduler = DDPMScheduler(T, **theirs)
    schedule = schedules.make(name, T)
    torch.testing.assert_close(scheduler.betas.double(), schedule.betas, rtol=rtol, atol=1e-7)
    torch.testing.assert_close(
        scheduler.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=rtol, atol=1e-9
    )


def test_a_shift_of_the_cosine_is_one_of_its_log_snr():
    plain, shifted = schedules.shifted_cosine(50), schedules.shifted_cosine(50, image_size=256)
    torch.testing.assert_close(shifted.snr, plain.snr / 16, rtol=1e-9, atol=0)
    early = schedules.make("cosine", T, s=0).snr[:900]  # the limits hardly matter there
    torch.testing.assert_close(
        schedules.shifted_cosine(T).snr[50:900], early[50:], rtol=0.02, atol=0
    )


def test_an_earlier_name_gives_the_same_schedule():
    old, new = schedules.make("sigmoid", 30), schedules.sigmoid_betas(30)
    assert torch.equal(old.betas, new.betas)
    assert old.name == new.name == "sigmoid_betas"


def test_a_narrow_sigmoid_falls_in_the_middle():
    wide, narrow = schedules.sigmoid_abar(T), schedules.sigmoid_abar(T, tau=0.3)
    assert narrow.alphas_cumprod[250] > wide.alphas_cumprod[250]
    assert narrow.alphas_cumprod[750] < wide.alphas_cumprod[750]


@pytest.mark.parametrize("name", ALL)
def test_posterior_tables_follow_from_bayes(name):
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0) up to a constant: for Gaussians,
    precisions add and the mean is the precision-weighted one."""
    schedule = schedules.make(name, T)
    for t in (1, 2, 10, 500, T - 2, T - 1):
        beta = schedule.betas[t].item()
        abar_prev = math.prod(1 - b for b in schedule.betas[:t].tolist())
        from_x_t, from_x_0 = (1 - beta) / beta, 1 / (1 - abar_prev)
        variance = 1 / (from_x_t + from_x_0)
        assert schedule.posterior_variance[t].item() == pytest.approx(variance, rel=1e-10)
        assert schedule.posterior_log_variance_clipped[t].item() == pytest.approx(
            math.log(variance), rel=1e-10
        )
        assert schedule.posterior_mean_coef_xt[t].item() == pytest.approx(
            variance * math.sqrt(1 - beta) / beta, rel=1e-10
        )
        assert schedule.posterior_mean_coef_x0[t].item() == pytest.approx(
            variance * math.sqrt(abar_prev) / (1 - abar_prev), rel=1e-10
        )


def test_first_step_of_the_posterior():
    schedule = schedules.linear(T)
    assert schedule.alphas_cumprod_prev[0] == 1
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_mean_coef_xt[0] == 0
    assert schedule.posterior_mean_coef_x0[0] == pytest.approx(1, rel=1e-12)
    log_variance = schedule.posterior_log_variance_clipped
    assert log_variance[0] == log_variance[1]
    assert schedules.linear(1).posterior_log_variance_clipped.item() == math.log(1e-4)


@given(st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_identities_hold_for_any_betas(betas):
    schedule = NoiseSchedule(float64(betas))
    abar, previous = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    assert schedule.num_timesteps == len(betas)
    assert bool((abar < previous).all())
    coef_x0, coef_xt = schedule.posterior_mean_coef_x0, schedule.posterior_mean_coef_xt
    # The posterior averaged over q(x_t | x_0) has the mean and variance of q(x_{t-1} | x_0).
    mean = coef_x0 + coef_xt * schedule.sqrt_alphas_cumprod
    variance = schedule.posterior_variance + coef_xt**2 * (1 - abar)
    torch.testing.assert_close(mean, previous.sqrt(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(variance, 1 - previous, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(schedule.snr * (1 - abar), abar, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_zero_terminal_snr(name):
    plain = schedules.make(name, T)
    schedule = schedules.make(name, T, zero_terminal_snr=True)
    assert schedule.has_zero_terminal_snr
    assert not plain.has_zero_terminal_snr
    assert schedule.alphas_cumprod[-1].item() == 0.0
    assert schedule.betas[-1].item() == 1.0
    assert schedule.snr[-1].item() == 0.0
    first = plain.sqrt_alphas_cumprod[0].item()
    last = plain.sqrt_alphas_cumprod[-1].item()
    assert schedule.sqrt_alphas_cumprod[0].item() == pytest.approx(first, rel=1e-15)
    wanted = (plain.sqrt_alphas_cumprod - last) * (first / (first - last))
    torch.testing.assert_close(schedule.sqrt_alphas_cumprod, wanted, rtol=1e-10, atol=1e-13)
    again = schedules.rescale_zero_terminal_snr(schedule)
    torch.testing.assert_close(again.alphas_cumprod, schedule.alphas_cumprod)


def test_zero_terminal_snr_is_that_of_diffusers():
    theirs = DDPMScheduler(T, beta_schedule="linear", rescale_betas_zero_snr=True)
    schedule = schedules.linear(T)
    rescaled = schedules.rescale_zero_terminal_snr(schedule)
    torch.testing.assert_close(
        theirs.alphas_cumprod.double(), rescaled.alphas_cumprod, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("zero_snr", [False, True], ids=["plain", "zero-terminal-snr"])
def test_respacing(zero_snr):
    schedule = schedules.make("cosine", 100, zero_terminal_snr=zero_snr)
    visited = torch.tensor([0, 3, 50, 98, 99])
    short = schedule.respaced(visited)
    abar = [schedule.alphas_cumprod[t].item() for t in visited]
    wanted = [1 - abar[0], *(1 - b / a for a, b in pairwise(abar))]
    torch.testing.assert_close(short.betas, float64(wanted), rtol=1e-14, atol=0)
    torch.testing.assert_close(short.alphas_cumprod, schedule.alphas_cumprod[visited])
    assert short.has_zero_terminal_snr == zero_snr
    everything = schedule.respaced(torch.arange(100))
    torch.testing.assert_close(everything.betas, schedule.betas, rtol=1e-9, atol=1e-14)


def test_coefficients_for_a_device_are_made_once():
    schedule = schedules.linear(10)
    signal, sigma = schedule.coefficients(torch.device("cpu"), torch.float32)
    assert signal.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(signal, schedule.sqrt_alphas_cumprod.float(), rtol=0, atol=0)
    torch.testing.assert_close(
        sigma, schedule.sqrt_one_minus_alphas_cumprod.float(), rtol=0, atol=0
    )
    again = schedule.coefficients(torch.device("cpu"), torch.float32)
    assert again[0] is signal
    assert schedule.coefficients(torch.device("cpu"), torch.float64)[0].dtype == torch.float64


PATHS = [
    pytest.param(schedules.linear(T), id="linear"),
    pytest.param(schedules.make("cosine", T, zero_terminal_snr=True), id="cosine, zero SNR"),
    pytest.param(schedules.flow(T), id="flow"),
    pytest.param(schedules.flow(T, shift=3.0), id="flow, shifted"),
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_alpha_and_sigma(path):
    """Signal falls, noise rises, and the ratios follow from the two."""
    alpha, sigma = path.alpha_t, path.sigma_t
    assert isinstance(path, GaussianPath)
    assert path.num_timesteps == T
    assert alpha.dtype == sigma.dtype == torch.float64
    assert alpha.shape == sigma.shape == (T,)
    assert bool((alpha.diff() < 0).all())
    assert bool((sigma.diff() > 0).all())
    torch.testing.assert_close(path.snr, alpha**2 / sigma**2, rtol=1e-14, atol=0)
    torch.testing.assert_close(path.lambda_t, path.snr.log() / 2, rtol=1e-12, atol=1e-14)
    if path.has_zero_terminal_snr:
        assert alpha[-1] == path.snr[-1] == 0
        assert path.lambda_t[-1] == -math.inf
    for table, kept in zip(
        (alpha, sigma), path.coefficients(torch.device("cpu"), torch.float32), strict=True
    ):
        assert torch.equal(kept, table.float())


@pytest.mark.parametrize("path", PATHS)
def test_levels_are_on_the_path(path):
    """At the ratio of any timestep, the alpha and sigma of that timestep; likewise in between."""
    last = T - 1 if path.has_zero_terminal_snr else T
    ratio = path.sigma_t[:last] / path.alpha_t[:last]
    alpha, sigma = path.levels(ratio)
    # 1e-11: at the first timesteps, a DDPM path's sigma is a difference of numbers near 1.
    torch.testing.assert_close(alpha, path.alpha_t[:last], rtol=1e-11, atol=0)
    torch.testing.assert_close(sigma, path.sigma_t[:last], rtol=1e-11, atol=0)
    between = torch.tensor([1e-6, 0.123, 1.0, 1e6], dtype=torch.float64)
    alpha, sigma = path.levels(between)
    torch.testing.assert_close(sigma / alpha, between, rtol=1e-14, atol=0)
    power = 1 if isinstance(path, FlowSchedule) else 2
    torch.testing.assert_close(alpha**power + sigma**power, torch.ones_like(alpha))


def test_a_path_of_ones_own_must_say_its_levels():
    with pytest.raises(NotImplementedError):
        GaussianPath().levels(torch.ones(1))


def test_the_straight_path():
    """Liu et al. 2022 (arXiv:2209.03003): alpha + sigma = 1, sigma in even steps from 1/T to 1."""
    path = schedules.flow(8)
    assert path.sigma_t.tolist() == [i / 8 for i in range(1, 9)]
    assert path.alpha_t.tolist() == [i / 8 for i in range(7, -1, -1)]
    assert path.has_zero_terminal_snr
    assert schedules.flow().num_timesteps == 1000
    assert repr(path) == "FlowSchedule(num_timesteps=8, shift=1.0)"
    one = schedules.flow(1)
    assert (one.alpha_t.item(), one.sigma_t.item()) == (0.0, 1.0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0], ids="shift={}".format)
def test_shift_is_that_of_the_paper_and_of_diffusers(shift):
    """Esser et al. 2024 (arXiv:2403.03206), eq. 23: it multiplies sigma / alpha."""
    path, plain = schedules.flow(T, shift), schedules.flow(T)
    ratio = path.sigma_t[:-1] / path.alpha_t[:-1]
    wanted = shift * plain.sigma_t[:-1] / plain.alpha_t[:-1]
    torch.testing.assert_close(ratio, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.alpha_t + path.sigma_t, torch.ones_like(path.alpha_t))
    theirs = FlowMatchEulerDiscreteScheduler(T, shift=shift)
    torch.testing.assert_close(theirs.sigmas.flip(0).double(), path.sigma_t, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", schedules.RESCALABLE)
def test_rescaled_betas_reach_noise_whatever_their_number(name):
    """OpenAI's and lucidrains' code scales the range of betas by 1000 / T."""
    for steps in (2, 3, 10, 20, 50, 200, 1000, 4000):
        schedule = schedules.make(name, steps, rescaled=True)
        assert 0 < schedule.alphas_cumprod[-1] < 0.01
        plain = schedules.make(name, steps)
        wanted = (plain.betas * 1000 / steps).clamp(max=0.999)
        torch.testing.assert_close(schedule.betas, wanted, rtol=1e-15, atol=0)
        assert schedule.options == {**plain.options, "rescaled": True}
    assert torch.equal(schedules.make(name, rescaled=True).betas, schedules.make(name).betas)


@pytest.mark.parametrize("steps", [1000, 7, 49, 1])
def test_a_network_of_flow_is_told_t_times_the_shifted_noise(steps):
    plain = schedules.flow(steps)
    t = torch.arange(steps)
    found = plain.labels_of(t, torch.float32)
    assert found.dtype == torch.int64
    assert found.tolist() == list(range(1, steps + 1))
    shifted = schedules.flow(steps, shift=3.0)
    found = shifted.labels_of(t, torch.float64)
    s = (t.double() + 1) / steps
    torch.testing.assert_close(found, 3 * steps * s / (1 + 2 * s), check_dtype=False)
    for path in (plain, shifted, schedules.flow(steps, 0.4)):
        labels = path.label(t.double(), path.sigma_t)
        torch.testing.assert_close(path.timestep(labels), t.double(), rtol=1e-9, atol=1e-5)
    old = schedules.flow(steps, 3.0, label_by="timestep")
    assert torch.equal(old.labels_of(t, torch.float32), t)
    assert torch.equal(old.timestep(t), t)
    assert "label_by='timestep'" in repr(old)
    linear = schedules.linear(10)
    assert torch.equal(linear.labels_of(t, torch.float32), t)


def test_a_schedule_knows_how_it_was_made():
    schedule = schedules.make("cosine", 50, s=0.01, zero_terminal_snr=True)
    again = schedules.make(schedule.name, schedule.num_timesteps, **schedule.options)
    assert torch.equal(again.betas, schedule.betas)
    assert "cosine" in repr(schedule)
    assert "50" in repr(schedule)
    assert NoiseSchedule(schedule.betas).name == "custom"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: NoiseSchedule(torch.zeros(0)), r"shape \[T\]", id="no betas"),
        pytest.param(lambda: NoiseSchedule(torch.ones(2, 2) / 2), r"shape \[T\]", id="a matrix"),
        pytest.param(lambda: NoiseSchedule(float64([0.1, -0.1])), r"\(0, 1\]", id="negative beta"),
        pytest.param(lambda: NoiseSchedule(float64([0.0, 0.1])), r"\(0, 1\]", id="zero beta"),
        pytest.param(lambda: NoiseSchedule(float64([0.1, 1.1])), r"\(0, 1\]", id="beta above 1"),
        pytest.param(lambda: NoiseSchedule(float64([0.1, math.nan])), r"\(0, 1\]", id="NaN"),
        pytest.param(lambda: NoiseSchedule(float64([1e-20])), r"\(0, 1\]", id="beta lost in 1"),
        pytest.param(
            lambda: NoiseSchedule(float64([0.1, 1.0, 0.1])), "from step 1 of 3", id="1 too early"
        ),
        pytest.param(
            lambda: schedules.linear(10, 0.999, 0.9999).respaced(torch.tensor([5, 2])),
            r"\(0, 1\]",
            id="respaced backwards",
        ),
        pytest.param(
            lambda: NoiseSchedule(torch.full((500,), 0.99)), "only the last", id="signal underflows"
        ),
        pytest.param(lambda: schedules.make("quadratic"), "unknown schedule", id="unknown name"),
        pytest.param(lambda: schedules.linear(0), "at least 1, got 0", id="no timesteps"),
        pytest.param(lambda: schedules.flow(0), "at least 1, got 0", id="flow of no timesteps"),
        *(
            pytest.param(
                lambda shift=shift: schedules.flow(10, shift),
                f"shift must be positive, got {shift}",
                id=f"flow shifted by {shift}",
            )
            for shift in (0.0, -1.0, math.inf, math.nan)
        ),
        pytest.param(lambda: schedules.cosine(-5), "at least 1, got -5", id="fewer than none"),
        pytest.param(lambda: schedules.linear(10, 0.02, 0.01), "beta_start <=", id="betas fall"),
        pytest.param(lambda: schedules.sigmoid(10, 0.0, 0.1), "0 < beta_start", id="starts at 0"),
        pytest.param(lambda: schedules.scaled_linear(10, 0.1, 1.0), "< 1", id="ends at 1"),
        pytest.param(lambda: schedules.cosine(10, max_beta=1.0), "max_beta < 1", id="cap of 1"),
        pytest.param(lambda: schedules.sigmoid_abar(9, tau=0.0), "tau > 0, got .* 0.0", id="tau"),
        pytest.param(lambda: schedules.sigmoid_abar(9, 3, -3), "start < end .* got 3", id="start"),
        pytest.param(lambda: schedules.shifted_cosine(9, 0), "at least 1, got 0", id="image of 0"),
        pytest.param(
            lambda: schedules.shifted_cosine(9, log_snr_max=-20), "got -20 and", id="log-SNR rises"
        ),
        pytest.param(
            lambda: schedules.rescale_zero_terminal_snr(schedules.linear(1)),
            "at least 2",
            id="zero SNR of one step",
        ),
    ],
)
def test_unusable_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("length", [100, 300, 4000])
def test_a_network_of_a_rescaled_schedule_is_told_the_same_label_everywhere(length):
    """By every loss, sampler and solver: 1000 t / T, as by OpenAI's code."""
    schedule = schedules.make("cosine", length, rescale_timesteps=True)
    told = []

    def model(x, t):
        told.append(t.double())
        return x

    t = torch.tensor([0, 7, length - 2])
    wanted = t * (1000.0 / length)
    x0, noise = torch.zeros(3, 1, 4, 4), torch.ones(3, 1, 4, 4)
    losses.simple_loss(schedule, model, x0, t, noise)
    losses.vlb_loss(schedule, model, x0, t, noise, variance="fixed_small")
    losses.hybrid_loss(schedule, lambda x, t: model(x.repeat(1, 2, 1, 1), t), x0, t, noise)
    sde.score_fn(model, "eps", sde.Interpolated(schedule))(x0, (t + 1).double() / length)
    for labels in told:
        torch.testing.assert_close(labels, wanted.double(), rtol=1e-6, atol=1e-5)
    told.clear()
    sampler = samplers.make("ddim", schedule, 3, grid=[length - 2, 7, 0])
    fastdiff.sample(model, sampler, (3, 1, 4, 4), seed=1, progress=False)
    torch.testing.assert_close(torch.stack(told).unique(), wanted.double(), rtol=1e-6, atol=1e-5)
    labels = schedule.labels_of(t, torch.float64)
    torch.testing.assert_close(schedule.timestep(labels.double()), t.double())


def test_the_bound_tells_a_network_of_a_rescaled_schedule_its_labels():
    told = []

    def model(x, t):
        told.append(t)
        return x

    schedule = schedules.rescale_timesteps(schedules.cosine(4))
    losses.bits_per_dim(
        model, schedule, torch.zeros(2, 1, 4, 4), variance="fixed_small", seed=0, progress=False
    )
    assert torch.stack(told)[:, 0].tolist() == [750, 500, 250, 0]


def test_a_rescaled_label_survives_zero_terminal_snr_and_says_so():
    schedule = schedules.make("cosine", 50, zero_terminal_snr=True, rescale_timesteps=True)
    assert schedule.rescale_timesteps
    assert schedule.has_zero_terminal_snr
    again = schedules.rescale_zero_terminal_snr(schedules.rescale_timesteps(schedules.cosine(50)))
    assert again.rescale_timesteps
    assert torch.equal(again.betas, schedule.betas)
    assert "rescale_timesteps=True" in repr(schedule)
    assert "rescale_timesteps" not in repr(schedules.cosine(50))
