"""Scales of classifier-free guidance for each step: in an interval of noise levels, and CFG++."""

from __future__ import annotations

import math

from fastdiff.samplers import Sampler, Table
from fastdiff.samplers.grids import SAME_LEVEL_RTOL
from fastdiff.sampling.arguments import begin_at


def interval(
    sampler: Sampler | Table, scale: float, sigma_min: float, sigma_max: float = math.inf
) -> list[float]:
    """Classifier-free guidance at some noise levels only (Kynkäänniemi et al. 2024, eq. 5).

    arXiv:2404.07724: at high noise guidance costs variety, at low noise it does nothing.

    Args:
        sampler: the sampler that the scales are for.
        scale: guidance of the steps that begin with sigma / alpha in the interval; it is 1 for
            other steps.
        sigma_min: lower end of the interval, excluded.
        sigma_max: upper end of the interval, included.

    Returns:
        One scale per step, for ``fastdiff.sample(guidance=)``.

    Raises:
        ValueError: not 0 <= sigma_min < sigma_max.
    """
    if not 0 <= sigma_min < sigma_max:
        raise ValueError(f"wanted 0 <= sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    table, _ = begin_at(sampler, 0)
    begins = [True, *table.ends_step[:-1]]
    alpha, sigma = table.levels[:-1][begins].unbind(1)
    alpha = alpha * (1 + SAME_LEVEL_RTOL)  # rounding must not move a level across an end
    inside = (sigma > sigma_min * alpha) & (sigma <= sigma_max * alpha)
    return [scale if here else 1.0 for here in inside.tolist()]


def cfg_plus_plus(sampler: Sampler | Table, strength: float) -> list[float]:
    """CFG++ with DDIM (Chung et al. 2024, arXiv:2406.08070, algorithm 2).

    CFG++ guides x_0 and adds the unconditional noise back. Both are linear in the difference of the
    two predictions, so it equals classifier-free guidance with another scale in each step.

    Args:
        sampler: DDIM without noise (eta = 0) and without clipping.
        strength: lambda of the paper, 0..1.

    Returns:
        One scale per step, for ``fastdiff.sample(guidance=)``.

    Raises:
        ValueError: another sampler, or a strength outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in 0..1, got {strength}")
    table, _ = begin_at(sampler, 0)
    clips = (table.column("clip_min") > -math.inf) | (table.column("quantile") > 0)
    if table.name != "ddim" or any(table.noisy) or bool(clips.any()):
        raise ValueError(
            f"cfg_plus_plus is for 'ddim' without noise and clipping, got {table.name!r}"
            f"{', with noise' if any(table.noisy) else ''}{', clipped' if clips.any() else ''}"
        )
    x0_m = table.column("x0_m")
    of_prediction = table.column("out_x0") * x0_m + table.column("out_m")
    scales = strength * table.levels[1:, 0] * x0_m / of_prediction
    return [float(value) for value in scales]
