"""Timestep samplers: probabilities, weights that leave the loss unbiased, and the history."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import norm

from fastdiff import losses, schedules

T = 40


def warm(history=3, uniform=0.1):
    """A sampler with full histories, of losses that grow with t."""
    sampler = losses.LossSecondMoment(T, history, uniform)
    for turn in range(history):
        sampler.update(torch.arange(T), torch.arange(T) * 0.5 + turn + 0.1)
    return sampler


SAMPLERS = [
    pytest.param(lambda: losses.Uniform(T), id="uniform"),
    pytest.param(lambda: losses.LowDiscrepancy(T), id="low-discrepancy"),
    pytest.param(lambda: losses.LogitNormal(T), id="logit-normal"),
    pytest.param(lambda: losses.LogitNormal(T, 0.7, 1.5), id="logit-normal, leaning"),
    pytest.param(lambda: losses.LossSecondMoment(T), id="second-moment, cold"),
    pytest.param(warm, id="second-moment"),
]


@pytest.mark.parametrize("make", SAMPLERS)
def test_weighted_losses_are_unbiased(make, generator):
    """sum_t p_t weight_t L_t is the plain mean of the L_t, by enumeration."""
    sampler = make()
    p = sampler.probabilities
    assert p.dtype == torch.float64
    assert p.sum().item() == pytest.approx(1, abs=1e-13)
    values = torch.randn(T, generator=generator, dtype=torch.float64)
    expected = (p * sampler.weights * values).sum()
    torch.testing.assert_close(expected, values.mean(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", SAMPLERS)
def test_draws_have_the_probabilities(make, generator):
    sampler, count = make(), 200_000
    t, weight = sampler.draw(count, generator)
    assert (t.dtype, weight.dtype) == (torch.int64, torch.float64)
    assert (t.shape, weight.shape) == ((count,), (count,))
    assert torch.equal(weight, sampler.weights[t])
    p = sampler.probabilities
    gap = (torch.bincount(t, minlength=T) / count - p).abs()
    assert bool((gap <= 4.5 * (p / count).sqrt() + 1 / count).all())


@pytest.mark.parametrize("make", SAMPLERS)
def test_draws_repeat_with_their_generator(make):
    first, second, other = (
        make().draw(50, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert make().draw(0)[0].shape == (0,)
    assert make().draw(3)[0].shape == (3,)


def test_low_discrepancy_covers_every_part_once(generator):
    for n in (T, T // 4, 7):
        t, _ = losses.LowDiscrepancy(T).draw(n, generator)
        counts, _ = torch.histogram(t.double(), n, range=(0, T))
        if T % n == 0:
            assert torch.equal(counts, torch.ones_like(counts))
        assert set((t.sort().values.diff() - T // n).tolist()) <= {0, 1}
    t, _ = losses.LowDiscrepancy(10).draw(35, generator)
    assert set(torch.bincount(t, minlength=10).tolist()) == {3, 4}


def test_low_discrepancy_is_uniform_for_each_image(monkeypatch):
    """Over all offsets, by enumeration, each image gets each timestep as often."""
    steps, n, offsets = 8, 3, 8 * 3 * 4
    counts = torch.zeros(n, steps)
    for j in range(offsets):
        offset = torch.tensor([(j + 0.5) / offsets], dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, offset=offset, **__: offset)
        t, _ = losses.LowDiscrepancy(steps).draw(n)
        counts[torch.arange(n), t] += 1
    assert torch.equal(counts, torch.full_like(counts, offsets / steps))


def test_logit_normal_probabilities():
    sampler = losses.LogitNormal(T, 0.7, 1.5)
    edges = [k / T for k in range(T + 1)]
    z = [-math.inf, *((math.log(s / (1 - s)) - 0.7) / 1.5 for s in edges[1:-1]), math.inf]
    wanted = norm.cdf(z[1:]) - norm.cdf(z[:-1])
    torch.testing.assert_close(
        sampler.probabilities, torch.from_numpy(wanted), rtol=1e-10, atol=1e-14
    )
    # The density of Esser et al., eq. 19, in the middle of a step.
    s = 20.5 / T
    density = math.exp(-((math.log(s / (1 - s)) - 0.7) ** 2) / 2 / 1.5**2)
    density /= 1.5 * math.sqrt(2 * math.pi) * s * (1 - s)
    assert sampler.probabilities[20].item() == pytest.approx(density / T, rel=1e-3)


def test_logit_normal_is_symmetric_to_its_last_digits():
    """Tails of 1e-12 at either end: the upper one is not a difference of numbers near 1."""
    p = losses.LogitNormal(1000).probabilities
    assert p[-1] < 1e-11
    torch.testing.assert_close(p, p.flip(0), rtol=1e-10, atol=0)


def test_logit_normal_as_the_weighting_itself(generator):
    sampler = losses.LogitNormal(T, unbiased=False)
    assert torch.equal(sampler.probabilities, losses.LogitNormal(T).probabilities)
    assert torch.equal(sampler.draw(9, generator)[1], torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("density", [losses.Laplace(0.4, 0.8), losses.Cosh(-1.0, 1.5)], ids=repr)
def test_log_snrs_follow_the_density(density):
    """Its integral over a cell, by the published formula."""
    schedule = schedules.cosine(1000)
    log_snr = schedule.snr.log()
    z = (log_snr - density.mean) / density.scale
    if isinstance(density, losses.Laplace):
        value = torch.exp(-z.abs()) / (2 * density.scale)
    else:
        value = 1 / (math.pi * density.scale * torch.cosh(z))
    mass = (value[1:-1] * (log_snr[:-2] - log_snr[2:]) / 2)[20:-20]
    p = losses.OfLogSNR(schedule, density).probabilities
    torch.testing.assert_close(p[21:-21], mass, rtol=2e-2, atol=0)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("density", [losses.Laplace(0.4, 0.8), losses.Cosh(-1.0, 1.5)], ids=repr)
def test_a_quantile_inverts_the_distribution_function(density):
    share = torch.linspace(0.001, 0.999, 41, dtype=torch.float64)
    torch.testing.assert_close(density.cumulative(density.quantile(share)), share)
    infinite = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    assert density.cumulative(infinite).tolist() == [0, 1]


def test_the_cosh_of_uniform_cosine_is_uniform():
    """Uniform times of the cosine schedule have the default density."""
    p = losses.OfLogSNR(schedules.cosine(1000, s=0), losses.Cosh()).probabilities
    torch.testing.assert_close(p[9:-9], torch.full_like(p[9:-9], 1e-3), rtol=5e-3, atol=0)


def test_a_density_of_log_snrs_weights_the_loss_itself(generator):
    zero_snr = schedules.rescale_zero_terminal_snr(schedules.linear(T))
    for schedule in (zero_snr, schedules.flow(T), schedules.linear(1)):
        t, weights = losses.OfLogSNR(schedule, losses.Laplace()).draw(50, generator)
        assert bool((weights == 1).all())
        assert bool((t < schedule.num_timesteps).all())


def test_second_moments_make_the_probabilities():
    sampler = losses.LossSecondMoment(3, history=2, uniform=0.3)
    sampler.update(torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1.0, 2.0, -3.0, 1.0, 4.0]))
    assert not sampler.warm
    assert torch.equal(sampler.probabilities, torch.full((3,), 1 / 3, dtype=torch.float64))
    sampler.update(torch.tensor([2]), torch.tensor([3.0]))
    assert sampler.warm
    rms = [1.0, math.sqrt((4 + 16) / 2), 3.0]
    wanted = [0.7 * value / sum(rms) + 0.1 for value in rms]
    assert sampler.probabilities.tolist() == pytest.approx(wanted, rel=1e-14)
    # The oldest of timestep 1, which was 2, makes way.
    sampler.update(torch.tensor([1]), torch.tensor([5.0]))
    rms[1] = math.sqrt((16 + 25) / 2)
    wanted = [0.7 * value / sum(rms) + 0.1 for value in rms]
    assert sampler.probabilities.tolist() == pytest.approx(wanted, rel=1e-14)


def test_no_other_probabilities_give_less_variance(generator):
    """E[(weight L)^2] is (the mean of the root mean squares)^2, the least there is."""
    history = torch.rand(T, 4, generator=generator, dtype=torch.float64) + 0.01
    sampler = losses.LossSecondMoment(T, 4, uniform=0)
    for values in history.T:
        sampler.update(torch.arange(T), values)
    moments = (history**2).mean(1)
    p = sampler.probabilities
    least = (moments / (T * p) ** 2 * p).sum()
    torch.testing.assert_close(least, moments.sqrt().mean() ** 2, rtol=1e-12, atol=0)
    for _ in range(20):
        other = p * (1 + 0.1 * torch.randn(T, generator=generator, dtype=torch.float64)).abs()
        other /= other.sum()
        assert (moments / (T * other) ** 2 * other).sum() > least


def test_losses_of_zero_everywhere_stay_uniform():
    sampler = losses.LossSecondMoment(4, 1)
    sampler.update(torch.arange(4), torch.zeros(4))
    assert sampler.warm
    assert torch.equal(sampler.weights, torch.ones(4, dtype=torch.float64))


def test_state_goes_through_json():
    sampler = warm()
    sampler.update(torch.tensor([3, 3]), torch.tensor([1 / 3, 1e300], dtype=torch.float64))
    state = json.loads(json.dumps(sampler.state_dict()))
    other = losses.LossSecondMoment(T, 3, 0.1)
    other.load_state_dict(state)
    assert other.state_dict() == sampler.state_dict()
    for again in (sampler, other):
        again.update(torch.tensor([3, 5]), torch.tensor([0.3, 0.7]))
    assert torch.equal(other.probabilities, sampler.probabilities)
    assert bool(torch.isfinite(sampler.probabilities).all())
    half = losses.LossSecondMoment(2, 2)
    half.update(torch.tensor([0, 0, 1]), torch.ones(3))
    copy = losses.LossSecondMoment(2, 2)
    copy.load_state_dict(half.state_dict())
    assert not copy.warm
    copy.update(torch.tensor([1]), torch.ones(1))
    assert copy.warm


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_what_has_no_probability_is_never_drawn(u, monkeypatch):
    """Not even where the random number is the bound between two timesteps."""
    sampler = losses.LossSecondMoment(5, 1, uniform=0)
    sampler.update(torch.arange(5), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([u], dtype=torch.float64))
    t, weight = sampler.draw(1)
    assert t.item() == (3 if u >= 0.5 else 1)
    assert weight.item() == pytest.approx(2 / 5)


STATE = losses.LossSecondMoment(2, 1).state_dict()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda: losses.Uniform(0), ValueError, "at least 1, got 0", id="T"),
        pytest.param(lambda: losses.Uniform(3).draw(-1), ValueError, "got -1", id="n"),
        pytest.param(lambda: losses.LowDiscrepancy(3).draw(-1), ValueError, "got -1", id="even n"),
        pytest.param(
            lambda: losses.LogitNormal(3, math.nan), ValueError, "mean must be finite", id="mean"
        ),
        pytest.param(lambda: losses.LogitNormal(3, std=0), ValueError, "std .* got 0", id="std"),
        pytest.param(lambda: losses.Laplace(scale=0), ValueError, "scale .* got 0", id="scale"),
        pytest.param(lambda: losses.Cosh(math.inf), ValueError, "mean .* got inf", id="cosh"),
        pytest.param(
            lambda: losses.OfLogSNR(schedules.linear(9), losses.Laplace(1e6)), ValueError,
            r"no timestep of .* has a log-SNR that Laplace\(mean=1000000.0", id="density elsewhere",
        ),
        pytest.param(lambda: losses.LossSecondMoment(3, 0), ValueError, "history", id="history"),
        pytest.param(
            lambda: losses.LossSecondMoment(3, uniform=1.5), ValueError, "got 1.5", id="uniform"
        ),
        pytest.param(
            lambda: warm().update(torch.tensor([T]), torch.ones(1)), IndexError,
            r"0\.\.39, got 40", id="t",
        ),
        pytest.param(
            lambda: warm().update(torch.tensor([1.0]), torch.ones(1)), TypeError, "float32",
            id="t's dtype",
        ),
        pytest.param(
            lambda: warm().update(torch.tensor([1]), torch.tensor([1])), TypeError, "int64",
            id="losses' dtype",
        ),
        pytest.param(
            lambda: warm().update(torch.tensor([1, 2]), torch.ones(1)), ValueError,
            r"\(2,\) and \(1,\)", id="shapes",
        ),
        pytest.param(
            lambda: warm().update(torch.tensor([1]), torch.tensor([math.nan])), ValueError,
            "finite, got nan", id="nan",
        ),
        pytest.param(
            lambda: losses.LossSecondMoment(3, 1).load_state_dict(STATE), ValueError,
            "num_timesteps 2, this sampler 3", id="state of another T",
        ),
        pytest.param(
            lambda: losses.LossSecondMoment(2, 1).load_state_dict({**STATE, "losses": [[1.0]]}),
            ValueError, "2 lists of up to 1 losses, got 1 of up to 1", id="too few lists",
        ),
        pytest.param(
            lambda: losses.LossSecondMoment(2, 1).load_state_dict(
                {**STATE, "losses": [[], [1, 2]]}
            ),
            ValueError, "got 2 of up to 2", id="too long a list",
        ),
        pytest.param(
            lambda: losses.LossSecondMoment(2, 1).load_state_dict(
                {**STATE, "losses": [[], [math.inf]]}
            ),
            ValueError, "finite", id="an infinite loss",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_refused_update_changes_nothing():
    sampler = warm()
    before = sampler.state_dict()
    with pytest.raises(IndexError):
        sampler.update(torch.tensor([0, -1]), torch.ones(2))
    assert sampler.state_dict() == before
