"""The loop of the fixed-step solvers: times, dtypes, determinism, what is asked for, refusals."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from fastdiff import schedules
from fastdiff.sde import EDM, VE, VP, Interpolated, SubVP, score_fn, solvers
from fastdiff.sde.solvers.fixed_steps import time_grid

METHODS = ["euler-maruyama", "reverse-diffusion", "ancestral", "probability-flow"]
CORRECTORS = [None, "langevin", "annealed-langevin"]
COSINE = Interpolated(schedules.cosine(50))
solve = partial(solvers.solve, progress=False)
gaussian = score_fn(lambda x, label: 0.3 * x, "eps", VP())


def test_grids():
    for sde, last in ((VP(), 1e-3), (SubVP(), 1e-3), (VE(), 1e-5), (COSINE, 0.02)):
        grid = time_grid(sde, 7)
        assert (grid.dtype, grid.shape) == (torch.float64, (8,))
        assert (grid[0].item(), grid[-1].item()) == (1, last)
        torch.testing.assert_close(grid.diff(), torch.full((7,), (last - 1) / 7).double())
    assert time_grid(VP(), 2, start=0.5).tolist() == pytest.approx([0.5, 0.2505, 0.001])
    assert time_grid(VP(), 1).tolist() == [1, 1e-3]


def test_the_grid_of_edm_is_that_of_karras():
    grid = time_grid(EDM(), 17)
    powers = grid ** (1 / 7)
    torch.testing.assert_close(powers.diff(), ((powers[-1] - powers[0]) / 17).expand(17))
    assert (grid[0].item(), grid[-1].item()) == (80, 0.002)
    # For 18 levels, the second and the one before the last, from the formula by hand.
    assert grid[1].item() == pytest.approx(57.58598, rel=1e-6)
    assert grid[16].item() == pytest.approx(0.0075282, rel=1e-4)


def recorded(seen):
    def score(x, t):
        seen.append(t)
        return -x

    return score


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("denoise", [False, True])
def test_when_the_score_is_asked(denoise, corrector, generator):
    """At each step's beginning, to correct at its end, and once more to denoise."""
    seen = []
    options = {"corrector": corrector, "corrector_steps": 2, "denoise": denoise}
    solve(recorded(seen), VP(), torch.zeros(3, 4), 5, generator=generator, **options)
    grid = time_grid(VP(), 5).tolist()
    wanted = [time for t, s in pairwise(grid) for time in ([t, s, s] if corrector else [t])] + [
        grid[-1]
    ] * denoise
    assert [t.tolist() for t in seen] == [[time] * 3 for time in wanted]
    assert {t.dtype for t in seen} == {torch.float64}


def test_the_probability_flow_draws_nothing():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    x = torch.ones(2, 3)
    solve(gaussian, VP(), x, 5, method="probability-flow", generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(x, torch.ones(2, 3))  # x_T is left alone


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("method", METHODS[:3])
def test_a_generator_decides(method, corrector, generator):
    x_T = torch.randn(3, 2, 4, generator=generator)
    options = {"method": method, "corrector": corrector}

    def run(seed):
        return solve(
            gaussian, VP(), x_T, 5, generator=torch.Generator().manual_seed(seed), **options
        )

    one = run(1)
    assert torch.equal(one, run(1))
    assert not torch.equal(one, run(2))
    torch.manual_seed(1)  # the global generator with that seed
    assert torch.equal(one, solve(gaussian, VP(), x_T, 5, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method, corrector, dtype, generator):
    x_T = torch.randn(3, 2, 4, generator=generator).to(dtype)

    def score(x, t):
        assert x.dtype == dtype
        return gaussian(x, t)

    x = solve(score, VP(), x_T, 5, method=method, corrector=corrector, generator=generator)
    assert (x.dtype, x.shape) == (dtype, x_T.shape)
    assert bool(x.isfinite().all())
    assert not x.requires_grad


def test_half_precision_is_rounded_by_the_network_alone():
    """999 steps, each too small for a bfloat16 of 1 to notice."""
    x_T = torch.full((1, 4), 100.0, dtype=torch.bfloat16)
    sde = VE(0.1, 10.0)
    up = lambda x, t: torch.ones_like(x)  # noqa: E731
    x = solve(up, sde, x_T, 999, method="probability-flow", denoise=False)
    # the integral of g^2 / 2, to Euler's error
    wanted = 100 + (10**2 - 0.1**2) / 2
    assert x.dtype == torch.bfloat16
    assert x[0].tolist() == [pytest.approx(wanted, rel=2**-8)] * 4


def test_gradients_are_not_kept():
    weight = torch.ones(4, requires_grad=True)
    x = solve(lambda x, t: -weight * x, VP(), torch.ones(2, 4), 3)
    assert not x.requires_grad


def test_going_on_from_a_time(generator):
    """Half of the steps, then the other half, is all of them."""
    x_T = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    sde = VP()
    whole = solve(gaussian, sde, x_T, 8, method="probability-flow")
    middle = time_grid(sde, 8)[4].item()
    first = VP()
    first.smallest = middle
    half = solve(gaussian, first, x_T, 4, method="probability-flow", denoise=False)
    other = solve(gaussian, sde, half, 4, method="probability-flow", start=middle)
    torch.testing.assert_close(other, whole, rtol=1e-12, atol=1e-12)


def test_no_images_and_memory_formats(generator):
    for corrector in CORRECTORS:
        assert solve(gaussian, VP(), torch.zeros(0, 3, 4), 2, corrector=corrector).shape == (
            0, 3, 4,
        )  # fmt: skip
    x_T = torch.randn(2, 3, 4, 5, generator=generator)
    last = x_T.contiguous(memory_format=torch.channels_last)
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    plain, other = (
        solve(gaussian, VP(), x, 3, generator=seed)
        for x, seed in zip((x_T, last), seeds, strict=True)
    )
    torch.testing.assert_close(plain, other)
    assert other.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("where", "corrector", "message"),
    [
        (0, None, r"^step 0 \(t = 1\): of the score's 4 values .*: 2 of image 1$"),
        (3, None, r"^step 3 \(t = 0.25075\): "),
        (4, None, r"^the last denoising step \(t = 0.001\): "),
        (1, "langevin", r"^step 0, corrector \(t = 0.75025\): "),
        (2, "annealed-langevin", r"^step 1 \(t = 0.75025\): "),
    ],
)
def test_a_score_that_is_not_finite(where, corrector, message):
    calls = []

    def score(x, t):
        found = -x
        if len(calls) == where:
            found[1, :2] = math.nan
        calls.append(t)
        return found

    x_T = torch.ones(3, 4)
    with pytest.raises(FloatingPointError, match=message):
        solve(score, VP(), x_T, 4, corrector=corrector, check_finite=True)
    calls.clear()
    x = solve(score, VP(), x_T, 4, corrector=corrector)
    assert bool(x[1].isnan().any())
    assert bool(x[[0, 2]].isfinite().all())  # the others do not suffer


def test_many_images_that_are_not_finite():
    wrong = lambda x, t: torch.full_like(x, math.inf)  # noqa: E731
    with pytest.raises(FloatingPointError, match=r"2 of image 3 and of 5 more$"):
        solve(wrong, VP(), torch.zeros(9, 2), 1, check_finite=True)


def test_the_progress_bar(capsys):
    solvers.solve(gaussian, VP(), torch.zeros(1, 2), 3, progress="drawing")
    assert "drawing" in capsys.readouterr().err
    solve(gaussian, VP(), torch.zeros(1, 2), 3)
    assert capsys.readouterr().err == ""


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: solve(gaussian, VP(), X, 0), ValueError, "steps must be at least 1, got 0"),
        (lambda: solve(gaussian, VP(), X, 2.5), TypeError, "steps must be a whole number, got 2.5"),
        (
            lambda: solve(gaussian, VP(), X, 2, method="heun"),
            ValueError,
            "unknown method 'heun', wanted one of euler-maruyama, reverse-diffusion, ancestral, "
            "probability-flow",
        ),
        (
            lambda: solve(gaussian, VP(), X, 2, corrector="none"),
            ValueError,
            "unknown corrector 'none', wanted one of langevin, annealed-langevin",
        ),
        (lambda: solve(gaussian, VP(), X, 2, snr=0.0), ValueError, "snr must be positive .* 0.0"),
        (lambda: solve(gaussian, VP(), X, 2, snr=math.nan), ValueError, "snr must be positive"),
        (
            lambda: solve(gaussian, VP(), X, 2, corrector_steps=0),
            ValueError,
            "corrector_steps must be at least 1, got 0",
        ),
        (lambda: solve(gaussian, VP(), X[0], 2), ValueError, r"shape \[N, ...\], got \(3,\)"),
        (lambda: solve(gaussian, VP(), X.long(), 2), TypeError, "x_T must be floating point"),
        (lambda: solve(gaussian, VP(), [0.0], 2), TypeError, "x_T must be a tensor, got list"),
        (lambda: solve(gaussian, VP(), X, 2, start=1.5), ValueError, "at most 1, got 1.5"),
        (lambda: solve(gaussian, VP(), X, 2, start=1e-3), ValueError, "more than 0.001 and"),
        (lambda: time_grid(EDM(), 2, start=math.nan), ValueError, "at most 80, got nan"),
        (
            lambda: solve(lambda x, t: x[:1], VP(), X, 2),
            ValueError,
            r"the score must return images of shape \(2, 3\), got \(1, 3\)",
        ),
        (lambda: solve(lambda x, t: None, VP(), X, 2), TypeError, "a tensor, got NoneType"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
