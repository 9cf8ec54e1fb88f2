"""Averages of weights whose profile is a power of time (Karras et al. 2024, arXiv:2312.02696).

After step T of a run, such an average weighs the weights of time t by

    p(t) = (gamma + 1) t^gamma / T^(gamma + 1),    0 <= t <= T    (equation 121 and those after it)

so that all profiles of an exponent gamma have one shape, and the run's beginning fades as the run
grows. The exponent is named by the profile's standard deviation relative to T, ``std``. From
averages that were kept along a run, those of any other exponent follow afterwards: profiles are
functions with inner products in closed form, and the wanted profile is a combination of the kept
ones, by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff.common.errors import InputError

LARGEST_STD = 1 / math.sqrt(12)  # of the uniform profile, gamma = 0
SMALLEST_STD = 1e-3
_RANK = 1e-14  # singular values below this share of the largest are rounding


def exponent(std: float) -> float:
    """The exponent gamma of the profile of a relative standard deviation.

    It is the largest root of (gamma + 2)^2 (gamma + 3) std^2 = gamma + 1 (algorithm 2).

    Raises:
        InputError: ``std`` is not in 0.001..1 / sqrt(12); the latter is the uniform average.
    """
    check_std(std)
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return max(0.0, float(roots.real.max()))


def check_std(std: float) -> None:
    """InputError unless :func:`exponent` takes ``std``."""
    if not SMALLEST_STD <= std <= LARGEST_STD:
        raise InputError(
            f"the standard deviation of a power function's average must lie in {SMALLEST_STD}.."
            f"{LARGEST_STD:.4f} (a uniform average), got {std}"
        )


def weight(gamma: float, step: int) -> float:
    """How far the average moves to the weights after step ``step``, counted from 0.

    It is 1 - beta_t with beta_t = (1 - 1/t)^(gamma + 1) and t = step + 1. With these, the weights
    of step t have the share of the profile between t - 1 and t.
    """
    return 1.0 if step == 0 else -math.expm1((gamma + 1) * math.log1p(-1 / (step + 1)))


def inner_products(steps: Tensor, gammas: Tensor, other: Tensor, others: Tensor) -> Tensor:
    """The integral over time of the product of each two profiles.

    Args:
        steps: ends T of the first profiles, float64 [N].
        gammas: their exponents, float64 [N].
        other: ends of the second profiles, float64 [M].
        others: their exponents, float64 [M].

    Returns:
        float64 [N, M].
    """
    t_a, t_b, a, b = steps[:, None], other[None], gammas[:, None], others[None]
    # The product is a power of time up to the earlier end; the profile that ends later is small
    # there, by its exponent.
    fading = (torch.minimum(t_a, t_b) / torch.maximum(t_a, t_b)) ** torch.where(t_a < t_b, b, a)
    return (a + 1) * (b + 1) / (a + b + 1) * fading / torch.maximum(t_a, t_b)


@dataclass(frozen=True)
class Combination:
    """Kept averages combined to one that was not kept.

    Attributes:
        coefficients: of the kept averages, float64 [N], whose sum is 1.
        residual: distance of the combined profile to the wanted one, relative to the norm of the
            wanted one; both norms are integrals of squares over time.
    """

    coefficients: Tensor
    residual: float


def combine(steps: Sequence[int], stds: Sequence[float], step: int, std: float) -> Combination:
    """The combination of kept averages whose profile is nearest to a wanted one.

    Its profile has the integral 1, like each of theirs, so that weights that do not change are
    reproduced.

    Args:
        steps: numbers of steps after which averages were kept, [N].
        stds: relative standard deviations of their profiles, [N].
        step: the number of steps after which the average is wanted.
        std: the relative standard deviation of its profile.

    Raises:
        InputError: a standard deviation out of range.
    """
    ends = torch.tensor([*steps], dtype=torch.float64)
    gammas = torch.tensor([exponent(value) for value in stds], dtype=torch.float64)
    end = torch.tensor([step], dtype=torch.float64)
    gamma = torch.tensor([exponent(std)], dtype=torch.float64)
    norms = inner_products(ends, gammas, ends, gammas).diagonal().sqrt()
    gram = inner_products(ends, gammas, ends, gammas) / norms[:, None] / norms
    wanted = inner_products(ends, gammas, end, gamma)[:, 0] / norms
    sums = 1 / norms  # the integrals of the profiles, of norm 1 from here on
    # min |sum_i y_i p_i - p|^2 with sum_i y_i sums_i = 1, by a Lagrange multiplier.
    free, along = torch.linalg.lstsq(
        gram, torch.stack([wanted, sums], 1), rcond=_RANK, driver="gelsd"
    ).solution.unbind(1)
    y = free + along * (1 - sums @ free) / (sums @ along)
    norm = float(inner_products(end, gamma, end, gamma))
    square = norm - 2 * float(wanted @ y) + float(y @ gram @ y)
    return Combination(y / norms, math.sqrt(max(0.0, square) / norm))
