"""Tolerances beside the rounding of what is solved: defaults, a warning, and an end in any case."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastdiff.common.errors import StuckError
from fastdiff.sde import VP, integrate, log_likelihood, solve_adaptive, solve_ode
from fastdiff.sde.solvers.rounding import (
    CHECK_AFTER_EVALUATIONS,
    MAX_EVALUATIONS,
    TOLERANCES,
    tolerance_for,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES)


def gaussian(x, t):
    """The score of standard normal images under VP."""
    return -x


def curved(x, t, index):
    """A smooth field whose values are rounded to the dtype of x."""
    at = torch.sin(3 * x.double()) * torch.cos(5 * t).view(-1, 1)
    return (at + 1).to(x.dtype)


@DTYPES
def test_default_tolerances_suit_the_dtype(dtype):
    x = torch.linspace(-1, 1, 8).view(2, 4).to(dtype)
    assert tolerance_for(x) == TOLERANCES[dtype]
    tolerance = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run in (
            lambda **options: integrate(curved, x, 0, 3, **options).x,
            lambda **options: solve_ode(gaussian, VP(), x, **options).x,
            lambda **options: log_likelihood(gaussian, VP(), x, progress=False, **options).logp,
        ):
            assert torch.equal(run(), run(**tolerance))
    assert integrate(curved, x, 0, 3).evaluations.max() < 400


def test_the_coarsest_dtype_counts():
    x = torch.zeros(1, 2, dtype=torch.float64)
    assert tolerance_for(x, torch.float32) == TOLERANCES[torch.float32]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tolerance_for(x) == TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-11), (torch.float16, 3e-7), (torch.bfloat16, 1e-6)],
)
def test_a_tolerance_below_the_rounding_is_told_of(dtype, tolerance):
    x = torch.linspace(-1, 1, 64, dtype=torch.float64).view(1, 64)
    options = {"rtol": tolerance, "atol": tolerance}
    told = rf"^fastdiff: rounding in {dtype} makes \d+% .* sample 0 .* rtol {tolerance:g}"
    with pytest.warns(UserWarning, match=told) as seen:
        narrow = integrate(curved, x.to(dtype), 0, 3, **options)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = integrate(curved, x, 0, 3, **options)
    assert narrow.evaluations.max() > 3 * wide.evaluations.max()


def test_jumps_are_no_rounding():
    """A field that jumps takes many steps, too."""

    def steps(x, t, index):
        return (torch.sin(x.double()) * (100 * t).floor().view(-1, 1)).to(x.dtype)

    x = torch.ones(1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = integrate(steps, x, 0, 3, rtol=1e-5, atol=1e-5)
    assert found.evaluations.max() > CHECK_AFTER_EVALUATIONS


def test_adaptive_steps_below_the_rounding_are_told_of(generator):
    x = torch.randn(2, 16, generator=generator).bfloat16()
    options = {"eps_rel": 1e-4, "eps_abs": 1e-4, "generator": generator, "progress": False}
    told = r"rounding in torch\.bfloat16 .* eps_rel 0\.0001, eps_abs 0\.0001"
    with pytest.warns(UserWarning, match=told):
        solve_adaptive(gaussian, VP(), x, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = solve_adaptive(gaussian, VP(), x, generator=generator, progress=False)
    assert found.evaluations.max() < 100


def test_nothing_runs_without_an_end():
    """Noise in place of a field, as of a network with dropout: hardly a step is good."""
    x = torch.zeros(1, 2, dtype=torch.float64)
    asked = []

    def noise(x, t, index):
        asked.append(t)
        return torch.randn(x.shape, dtype=x.dtype)

    warned = pytest.warns(UserWarning, match=r"eval\(\)")
    with warned, pytest.raises(StuckError, match=r"used up .* rtol 1e-09.* take larger tolerances"):
        integrate(noise, x, 0, 1, rtol=1e-9, atol=1e-9)
    assert MAX_EVALUATIONS - 6 <= len(asked) <= MAX_EVALUATIONS
