"""Which timesteps a shorter process visits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from fastdiff.samplers import SPACINGS, spaced_timesteps

T = 1000


def exact(spacing: str, steps: int) -> tuple[torch.Tensor, int]:
    """The visited times before rounding, as fractions: numerators [steps] and the denominator."""
    i = torch.arange(steps)
    if spacing == "leading":
        return (steps - 1 - i) * (T // steps), 1
    if spacing == "trailing":
        return (T - 1) * steps - i * T, steps
    below = max(steps - 1, 1)
    return (T - 1) * (below - i), below


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps(spacing):
    for steps in range(1, T + 1):
        timesteps = spaced_timesteps(T, steps, spacing)
        assert timesteps.shape == (steps,)
        assert timesteps.dtype == torch.int64
        assert 0 <= timesteps[-1] <= timesteps[0] < T
        assert bool((timesteps[1:] < timesteps[:-1]).all()), steps
        numerators, denominator = exact(spacing, steps)
        off = (timesteps * denominator - numerators).abs()
        assert bool((2 * off <= denominator).all()), steps


@pytest.mark.parametrize(
    ("spacing", "steps", "wanted"),
    [
        pytest.param("leading", 4, [750, 500, 250, 0], id="leading"),
        pytest.param("trailing", 4, [999, 749, 499, 249], id="trailing"),
        pytest.param("linspace", 4, [999, 666, 333, 0], id="linspace"),
        pytest.param("leading", 1, [0], id="leading-1"),
        pytest.param("trailing", 1, [999], id="trailing-1"),
        pytest.param("linspace", 1, [999], id="linspace-1"),
    ],
)
def test_known_values(spacing, steps, wanted):
    assert spaced_timesteps(T, steps, spacing).tolist() == wanted


def test_offset_moves_leading_timesteps():
    """Stable Diffusion's offset of 1."""
    assert spaced_timesteps(T, 4, "leading", 1).tolist() == [751, 501, 251, 1]
    assert spaced_timesteps(T, 10, "leading", 99)[0] == 999


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [2, 5, 7, 10, 20, 50, 100, 250, 333, 500, 1000])
def test_the_usual_numbers_of_steps_are_those_of_diffusers(spacing, steps):
    scheduler = DDIMScheduler(T, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert np.array_equal(spaced_timesteps(T, steps, spacing).numpy(), scheduler.timesteps.numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((T, 0), r"1\.\.1000 .* got 0", id="no steps"),
        pytest.param((T, -3), r"1\.\.1000 .* got -3", id="negative"),
        pytest.param((T, T + 1), r"1\.\.1000 .* got 1001", id="more than T"),
        pytest.param((T, 10, "cosine"), "unknown spacing 'cosine'", id="unknown spacing"),
        pytest.param((T, 10, "trailing", 1), "leading spacing only", id="offset of trailing"),
        pytest.param((T, 10, "leading", 100), r"outside 0\.\.999", id="offset too large"),
        pytest.param((T, T, "leading", 1), r"1\.\.1000", id="offset with all steps"),
        pytest.param((T, 10, "leading", -1), r"-1\.\.899", id="negative offset"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(*arguments)
