"""The noise level as a function of time, sigma(t), in which samplers count their steps.

Every sampler works with the level r = sigma / alpha of the unscaled image, which EDM (Karras et al.
2022, arXiv:2206.00364) calls sigma. Which function of a time it is matters for two things alone:
where a grid that is even in that time has its levels, and along which lines a step is straight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

# The smallest time of the variance-preserving process of Song et al. 2021 (arXiv:2011.13456,
# appendix C) and of EDM's tests with it.
VP_SMALLEST = 1e-3


@dataclass(frozen=True)
class NoiseTime:
    """A function sigma(t) with sigma(0) = 0.

    Attributes:
        time: the time at a level sigma.
        level: sigma at a time.
        slope: the derivative of sigma at the time of a level, which is not 0.
    """

    time: Callable[[float], float]
    level: Callable[[float], float]
    slope: Callable[[float], float]


def preserving(low: float, high: float) -> NoiseTime:
    """That of the variance-preserving process, ``low`` at time 0.001 and ``high`` at time 1.

    sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1, with beta from beta_min at time 0 to
    beta_min + beta_d at time 1 (EDM, table 1, column VP).

    Raises:
        ValueError: beta would fall with time, since ``low`` is too near to ``high``.
    """
    first, last = math.log1p(low**2), math.log1p(high**2)
    beta_d = 2 * (first / VP_SMALLEST - last) / (VP_SMALLEST - 1)
    if not beta_d > 0:
        raise ValueError(
            "the noise levels of a variance-preserving process rise from sigma_min at time "
            f"{VP_SMALLEST:g} to sigma_max at time 1, which needs a smaller sigma_min or a "
            f"larger sigma_max, got {low:g} and {high:g}"
        )
    betas = beta_d, last - beta_d / 2
    return NoiseTime(
        partial(_preserving_time, *betas),
        partial(_preserving_level, *betas),
        partial(_preserving_slope, *betas),
    )


# Functions of the module, not lambdas, so that samplers can be pickled.
def _preserving_time(beta_d: float, beta_min: float, level: float) -> float:
    if level == 0:  # where beta_min is negative, sigma has a second zero soon after
        return 0.0
    return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(level**2)) - beta_min) / beta_d


def _preserving_level(beta_d: float, beta_min: float, time: float) -> float:
    return math.sqrt(math.expm1(beta_d * time**2 / 2 + beta_min * time))


def _preserving_slope(beta_d: float, beta_min: float, level: float) -> float:
    beta = beta_min + beta_d * _preserving_time(beta_d, beta_min, level)
    return beta / 2 * (level + 1 / level)


def _exploding_time(level: float) -> float:
    return level**2


def _exploding_slope(level: float) -> float:
    return 1 / (2 * level)


def _same(value: float) -> float:
    return value


def _one(level: float) -> float:
    return 1.0


# EDM's own, and that of the variance-exploding process, sqrt(t) (table 1, columns EDM and VE).
LINEAR = NoiseTime(_same, _same, _one)
EXPLODING = NoiseTime(_exploding_time, math.sqrt, _exploding_slope)
