"""Averages by a power function: closed forms against numerical integrals, and reconstruction."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastdiff import ops
from fastdiff.common.errors import InputError
from fastdiff.training import power_function
from fastdiff.training.power_function import LARGEST_STD, combine, exponent, inner_products, weight

STDS = [0.005, 0.05, 0.1, 0.2, LARGEST_STD]


def profile(gamma: float, end: float, times: torch.Tensor) -> torch.Tensor:
    inside = (gamma + 1) / end * (times / end) ** gamma
    return torch.where(times <= end, inside, 0)


def grid(end: float, count: int = 200_000) -> torch.Tensor:
    """The middles of intervals of one size, for integrals by sums."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) * (end / count)


@pytest.mark.parametrize("std", STDS)
def test_the_exponent_is_that_of_the_standard_deviation(std) -> None:
    gamma, times = exponent(std), grid(1)
    p = profile(gamma, 1, times) / len(times)
    center = float((p * times).sum())
    assert float(p.sum()) == pytest.approx(1, rel=1e-4)
    assert math.sqrt(float((p * (times - center) ** 2).sum())) == pytest.approx(std, rel=1e-3)


def test_an_exponent_by_hand() -> None:
    """gamma = 1 is a ramp, of mean 2 / 3 and variance 1 / 18."""
    assert exponent(math.sqrt(1 / 18)) == pytest.approx(1, abs=1e-12)
    assert exponent(LARGEST_STD) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("std", [0.0, -0.1, 1e-4, 0.3, math.nan])
def test_a_standard_deviation_out_of_range(std) -> None:
    with pytest.raises(InputError, match=r"must lie in 0\.001\.\.0\.2887"):
        exponent(std)


def test_inner_products_are_integrals() -> None:
    ends = torch.tensor([3.0, 7.0, 7.0, 10.0], dtype=torch.float64)
    gammas = torch.tensor([6.9, 0.0, 2.5, 16.97], dtype=torch.float64)
    times = grid(10)
    p = torch.stack([profile(float(g), float(e), times) for g, e in zip(gammas, ends, strict=True)])
    wanted = p @ p.T * (10 / len(times))
    found = inner_products(ends, gammas, ends, gammas)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(inner_products(ends[:1], gammas[:1], ends, gammas), found[:1])


@pytest.mark.parametrize("std", STDS)
def test_the_running_average_has_the_profile(std) -> None:
    """The share of step t in the average is the integral of the profile from t - 1 to t."""
    gamma, count = exponent(std), 30
    average = torch.full((count,), 7.0, dtype=torch.float64)
    for step in range(count):
        now = torch.zeros(count, dtype=torch.float64)
        now[step] = 1
        average += weight(gamma, step) * (now - average)
    edges = (torch.arange(count + 1, dtype=torch.float64) / count) ** (gamma + 1)
    torch.testing.assert_close(average, edges.diff(), rtol=1e-9, atol=1e-14)


def one_hot_run(stds: list[float], steps: int) -> dict[tuple[int, float], torch.Tensor]:
    """The averages after every step of a run whose weights after step t are the t-th unit vector,
    so that each average is its own profile over the steps.
    """
    averages = {std: torch.zeros(steps) for std in stds}
    kept = {}
    for step in range(steps):
        now = torch.zeros(steps)
        now[step] = 1
        for std, average in averages.items():
            ops.ema_update([average], [now], weight(exponent(std), step))
            kept[step + 1, std] = average.double()
    return kept


@pytest.mark.parametrize("std", [0.06, 0.08, 0.15, 0.2])
def test_a_profile_is_reconstructed_to_the_residual(std) -> None:
    """The error over the steps is at most the residual, for each step's share is an integral of the
    profile over an interval of length one; rounding to float32 comes on top.
    """
    steps, every, ends = 96, 4, (96, 48)
    kept = one_hot_run([0.05, 0.10, std], steps)
    used = [(step, s) for step in range(every, steps + 1, every) for s in (0.05, 0.10)]
    for end in ends:
        found = combine([step for step, _ in used], [s for _, s in used], end, std)
        assert float(found.coefficients.sum()) == pytest.approx(1, abs=1e-9)
        assert 1e-6 < found.residual < 0.1
        made = sum(c * kept[key] for c, key in zip(found.coefficients, used, strict=True))
        gamma, last = torch.tensor([exponent(std)]).double(), torch.tensor([end]).double()
        norm = math.sqrt(float(inner_products(last, gamma, last, gamma)))
        error = float((made - kept[end, std]).norm())
        rounding = 1e-6 * float(found.coefficients.abs().sum()) * norm
        assert error <= found.residual * norm + rounding
        assert error > 0.1 * found.residual * norm  # the residual is not a loose bound


def test_more_snapshots_come_nearer() -> None:
    """The residual falls with the square of their number."""
    residuals = []
    for count in (8, 16, 32):
        steps = [step for step in range(1, count + 1) for _ in "ab"]
        residuals.append(combine(steps, [0.05, 0.1] * count, count, 0.08).residual)
    for few, many in itertools.pairwise(residuals):
        assert few / many == pytest.approx(4, rel=0.2)


def test_an_average_that_was_kept_is_itself() -> None:
    found = combine([10, 20, 20], [0.1, 0.05, 0.1], 20, 0.05)
    torch.testing.assert_close(found.coefficients, torch.tensor([0.0, 1, 0]).double())
    assert found.residual < 1e-7


def test_the_same_average_twice_is_no_obstacle() -> None:
    found = combine([10, 20, 20], [0.1, 0.1, 0.1], 20, 0.1)
    assert found.residual < 1e-7
    assert float(found.coefficients[1:].sum()) == pytest.approx(1)


def test_no_combination_is_nearer() -> None:
    """Of those whose coefficients sum to 1."""
    steps, stds = [10, 10, 20, 20], [0.05, 0.1, 0.05, 0.1]
    found = combine(steps, stds, 20, 0.07)
    ends = torch.tensor([*steps, 20]).double()
    gammas = torch.tensor([exponent(std) for std in (*stds, 0.07)]).double()
    gram = inner_products(ends, gammas, ends, gammas)

    def distance(coefficients: torch.Tensor) -> float:
        whole = torch.cat([coefficients, torch.tensor([-1.0]).double()])
        return math.sqrt(float(whole @ gram @ whole) / float(gram[-1, -1]))

    assert distance(found.coefficients) == pytest.approx(found.residual, rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        change = 0.01 * torch.randn(4, generator=generator).double()
        assert distance(found.coefficients + change - change.mean()) > found.residual


def test_the_first_step_replaces_the_start() -> None:
    assert power_function.weight(7.0, 0) == 1
    assert power_function.weight(7.0, 1) == pytest.approx(1 - 0.5**8)
