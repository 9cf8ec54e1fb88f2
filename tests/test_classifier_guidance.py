"""Guidance by classifiers and energies, intervals, and CFG++."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import guidance, process, samplers, schedules
from fastdiff.process import KINDS

SCHEDULE = schedules.linear(200)
S2, R2 = 0.5, 0.3  # variances of x0 ~ N(0, S2) and of y = x0 + N(0, R2)


def at(table: Tensor, t: Tensor) -> Tensor:
    return table[t].view(-1, 1)


def exact(kind: str, mean: Tensor | float, variance: float):
    """The best prediction for x0 ~ N(mean, variance), from its score."""

    def predict(x: Tensor, t: Tensor, **cond) -> Tensor:
        alpha, sigma = at(SCHEDULE.alpha_t, t), at(SCHEDULE.sigma_t, t)
        score = -(x - alpha * mean) / (alpha**2 * variance + sigma**2)
        a, b = process.conversion(SCHEDULE, "score", kind)
        return at(a, t) * x + at(b, t) * score

    return predict


def log_prob(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """log p(y | x_t): of x_0 given x_t, then of y given that."""
    alpha, sigma = at(SCHEDULE.alpha_t, t), at(SCHEDULE.sigma_t, t)
    total = alpha**2 * S2 + sigma**2
    mean, variance = alpha * S2 / total * x, S2 * sigma**2 / total
    return (-0.5 * (y - mean) ** 2 / (variance + R2)).sum(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_guided_prediction_is_that_of_the_posterior(kind, generator) -> None:
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 1, 50, 120, 198, 199])
    guided = guidance.classifier_guided(
        exact(kind, 0.0, S2), log_prob, SCHEDULE, kind=kind, arguments=["y"]
    )
    wanted = exact(kind, S2 / (S2 + R2) * y, S2 * R2 / (S2 + R2))(x, t)
    torch.testing.assert_close(guided(x, t, y=y), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "error"), [("ddim", 5e-3), ("dpmpp-2m", 5e-4), ("unipc-2", 5e-4)])
def test_guided_samples_follow_the_posterior(name, error) -> None:
    """The ODE carries deviations from the mean along: begun at the mean, it ends there."""
    sampler = samplers.make(name, SCHEDULE, 200, clip=None, grid="leading")
    guided = guidance.classifier_guided(
        exact("eps", 0.0, S2), log_prob, SCHEDULE, scale=1.0, arguments=["y"]
    )
    mean, variance = S2 / (S2 + R2) * 0.8, S2 * R2 / (S2 + R2)
    alpha, sigma = sampler.table.levels[0].tolist()
    deviation = math.sqrt(alpha**2 * variance + sigma**2)
    x_T = torch.tensor([[alpha * mean], [alpha * mean + deviation]], dtype=torch.float64)
    y = torch.full((2, 1), 0.8, dtype=torch.float64)
    low, high = fastdiff.sample(guided, sampler, (2, 1), x_T=x_T, cond={"y": y}, progress=False)
    assert low.item() == pytest.approx(mean, abs=error)
    assert (high - low).item() == pytest.approx(math.sqrt(variance), abs=error)


def test_a_scale_multiplies_the_gradient(generator) -> None:
    x, t = torch.randn(4, 3, generator=generator), torch.tensor([3, 40, 90, 150])
    y = torch.zeros(4, 3)

    def of(scale: float) -> Tensor:
        guided = guidance.classifier_guided(
            lambda x, t: torch.zeros_like(x), log_prob, SCHEDULE, scale=scale, arguments=["y"]
        )
        return guided(x, t, y=y)

    torch.testing.assert_close(of(3.0), 3 * of(1.0))
    assert not of(0.0).any()


ZERO_SNR = schedules.rescale_zero_terminal_snr(SCHEDULE)
FLOWS = [schedules.flow(200), schedules.flow(200, 3.0), schedules.flow(200, label_by="timestep")]


@pytest.mark.parametrize("path", [ZERO_SNR, *FLOWS], ids=repr)
def test_guidance_begins_where_there_is_some_signal(path, generator) -> None:
    """Where alpha is 0 the gradient's share would be infinite: the first step is not guided."""
    kind = "v" if path is ZERO_SNR else "flow"
    sampler = samplers.make("euler", path, 8, prediction=kind)
    x_T = torch.randn(4, 3, generator=generator)

    def drawn(scale: float) -> Tensor:
        guided = guidance.classifier_guided(
            lambda x, t: x / 2, lambda x, t: -x.square().sum(1), path, kind=kind, scale=scale
        )
        return fastdiff.sample(guided, sampler, (4, 3), x_T=x_T, progress=False)

    assert bool(drawn(0.5).isfinite().all())
    assert drawn(0.5).square().sum() < drawn(0.0).square().sum()


@pytest.mark.parametrize("path", FLOWS, ids=repr)
def test_guidance_reads_what_a_network_is_told_of_its_time(path, generator) -> None:
    """The share of the score in the flow, at the level that a label stands for."""
    x, t = torch.randn(3, 2, generator=generator, dtype=torch.float64), torch.tensor([4, 99, 198])
    label = path.labels_of(t, torch.float64)
    guided = guidance.classifier_guided(
        lambda x, t: torch.zeros_like(x), lambda x, t: x.sum(1), path, kind="flow"
    )
    _, share = process.conversion(path, "score", "flow")
    torch.testing.assert_close(guided(x, label), at(share, t).expand(3, 2), rtol=1e-9, atol=1e-9)


def test_times_between_two_timesteps_are_interpolated(generator) -> None:
    x = torch.randn(1, 3, generator=generator)
    guided = guidance.classifier_guided(
        lambda x, t: torch.zeros_like(x), lambda x, t: -x.square().sum(1), SCHEDULE
    )
    below, between, above = (guided(x, torch.tensor([t])) for t in (20.0, 20.25, 21.0))
    torch.testing.assert_close(between, 0.75 * below + 0.25 * above)
    assert not torch.equal(below, above)


def test_a_classifiers_log_probability_and_its_gradient(generator) -> None:
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 3, 2, 2, generator=generator, dtype=torch.float64)
    labels, t = torch.tensor([0, 4, 2]), torch.zeros(3, dtype=torch.int64)
    found = guidance.log_prob_of(lambda x, t: x.flatten(1) @ weight.T)
    gradient = guidance.gradient_of(found, x, t, labels=labels)
    probabilities = (x.flatten(1) @ weight.T).softmax(1)
    wanted = weight[labels] - probabilities @ weight
    torch.testing.assert_close(gradient.flatten(1), wanted, rtol=1e-6, atol=1e-6)


def test_a_guided_score_is_that_of_the_posterior(generator) -> None:
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    guided = guidance.guided_score(
        lambda x, t: -x, lambda x, t, y: -(x - y).square().sum(1), 2.0, y=1.0
    )
    torch.testing.assert_close(guided(x, torch.zeros(5)), -x - 4 * (x - 1))


def test_gradients_are_taken_where_sampling_takes_none(generator) -> None:
    with torch.no_grad():
        x = torch.randn(2, 3, generator=generator)
        gradient = guidance.gradient_of(lambda x, t: x.square().sum(1), x, torch.zeros(2))
    torch.testing.assert_close(gradient, 2 * x)
    assert not gradient.requires_grad
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("log_prob", "said"),
    [
        (lambda x, t: x, r"must return shape \(2,\), got \(2, 3\)"),
        (lambda x, t: 1.0, r"must return shape \(2,\), got float"),
        (lambda x, t: x.detach().sum(1), "has no gradient"),
        (lambda x, t: torch.zeros(2, requires_grad=True) * 1, "has no gradient"),
        (guidance.log_prob_of(lambda x, t: x.sum(1)), r"logits \[2, classes\], got shape \(2,\)"),
    ],
)
def test_a_log_prob_that_does_not_fit_is_refused(log_prob, said) -> None:
    labels = {"labels": torch.zeros(2, dtype=torch.int64)} if "logits" in said else {}
    with pytest.raises(ValueError, match=said):
        guidance.gradient_of(log_prob, torch.ones(2, 3), torch.zeros(2), **labels)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_is_refused(scale) -> None:
    with pytest.raises(ValueError, match="scale must be finite"):
        guidance.classifier_guided(lambda x, t: x, log_prob, SCHEDULE, scale=scale)
    with pytest.raises(ValueError, match="scale must be finite"):
        guidance.guided_score(lambda x, t: x, log_prob, scale)


def test_an_interval_guides_between_its_levels() -> None:
    sampler = samplers.make("ddim", SCHEDULE, 20)
    ratio = (sampler.table.levels[:-1, 1] / sampler.table.levels[:-1, 0]).tolist()
    scales = guidance.interval(sampler, 4.0, 0.3, 2.0)
    assert scales == [4.0 if 0.3 < r <= 2.0 else 1.0 for r in ratio]
    assert {1.0, 4.0} == set(scales)
    heun = samplers.make("heun", SCHEDULE, 7)  # two evaluations a step
    assert len(guidance.interval(heun, 4.0, 0.3)) == heun.steps
    with pytest.raises(ValueError, match="0 <= sigma_min < sigma_max"):
        guidance.interval(sampler, 4.0, 2.0, 1.0)


@pytest.mark.parametrize("towards", [0.0, math.inf])
def test_an_intervals_ends_are_levels_whatever_their_rounding(towards) -> None:
    sampler = samplers.make("euler", SCHEDULE, 40, grid="karras")
    levels = [math.nextafter(point.ratio, towards) for point in sampler.points]
    for i in range(39):
        scales = guidance.interval(sampler, 4.0, levels[i + 1], levels[i])
        assert scales == [4.0 if j == i else 1.0 for j in range(40)]


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_cfg_plus_plus_guides_x0_and_renoises_without(kind, strength, generator) -> None:
    sampler = samplers.make("ddim", SCHEDULE, 8, prediction=kind, clip=None)
    x_T = torch.randn(3, 2, generator=generator, dtype=torch.float64)

    def model(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return torch.sin(x + shift) + 0.01 * t.view(-1, 1)

    cond, uncond = ({"shift": torch.full((3, 1), value).double()} for value in (1.0, 0.2))
    got = fastdiff.sample(
        model, sampler, (3, 2), x_T=x_T, cond=cond, uncond=uncond,
        guidance=guidance.cfg_plus_plus(sampler, strength), progress=False,
    )  # fmt: skip
    x = x_T * sampler.table.init_noise_sigma
    for i, t in enumerate(sampler.table.timesteps.long()):
        time = t.expand(3)
        without, wanted = model(x, time, **uncond), model(x, time, **cond)
        x0 = process.to_x0(SCHEDULE, x, time, without + strength * (wanted - without), kind)
        eps = process.to_eps(SCHEDULE, x, time, without, kind)
        alpha, sigma = sampler.table.levels[i + 1]
        x = alpha * x0 + sigma * eps
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ddim", {"eta": 1.0, "clip": None}, "'ddim', with noise"),
        ("ddim", {}, "'ddim', clipped"),
        ("euler", {"clip": None}, "got 'euler'"),
    ],
)
def test_cfg_plus_plus_refuses_other_samplers(name, options, said) -> None:
    with pytest.raises(ValueError, match=said):
        guidance.cfg_plus_plus(samplers.make(name, SCHEDULE, 8, **options), 0.5)
    with pytest.raises(ValueError, match="strength must lie"):
        guidance.cfg_plus_plus(samplers.make("ddim", SCHEDULE, 8, clip=None), 1.5)
