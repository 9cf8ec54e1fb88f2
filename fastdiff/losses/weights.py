"""Loss weights of the timesteps, as float64 tables [T], and their conversion between predictions.

Given x_t, predictions of all kinds are linear in each other: A_t = a_t x_t + b_t B_t. The squared
error of A is then b_t^2 times the squared error of B, so that

    weight on B's error = b_t^2 * weight on A's error

leaves the loss the same (:func:`convert`). With alpha_t and sigma_t for sqrt(abar_t) and
sqrt(1 - abar_t), and SNR_t = alpha_t^2 / sigma_t^2,

    |x0 error|^2 = |eps error|^2 sigma^2 / alpha^2  = |eps error|^2 / SNR
    |v error|^2  = |x0 error|^2 (alpha^2 + sigma^2)^2 / sigma^2,  on DDPM's path (SNR + 1) times it
    |score error|^2 = |eps error|^2 / sigma^2
    |flow error|^2  = |x0 error|^2 (alpha + sigma)^2 / sigma^2

Each weighting below is one function of SNR. Its argument ``kind`` names the prediction to whose
squared error the weights apply: the loss is the same for every kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import process
from fastdiff.common.inputs import check_choice
from fastdiff.losses.variance import check_ddpm, fixed_log_variance
from fastdiff.schedules import GaussianPath, NoiseSchedule


def convert(schedule: GaussianPath, table: Tensor, from_kind: str, to_kind: str) -> Tensor:
    """The weights on ``to_kind``'s squared error that give the loss of ``table``.

    Args:
        schedule: the path, T steps.
        table: weights on the squared error of ``from_kind``, [T], floating point.
        from_kind: one of ``process.KINDS``.
        to_kind: one of ``process.KINDS``.

    Returns:
        float64 [T].

    Raises:
        TypeError: ``table`` is not floating point.
        ValueError: an unknown kind, a table of another shape, or a conversion from x0, v or flow to
            eps or score with a schedule of zero terminal SNR, where eps does not determine x_0.
    """
    process.check_kind(from_kind)
    process.check_kind(to_kind)
    if not table.dtype.is_floating_point:
        raise TypeError(f"table must be floating point, got {table.dtype}")
    if table.shape != schedule.alpha_t.shape:
        raise ValueError(
            f"table must have shape [{schedule.num_timesteps}], got {tuple(table.shape)}"
        )
    blind = ("eps", "score")
    if schedule.has_zero_terminal_snr and to_kind in blind and from_kind not in blind:
        raise ValueError(
            f"no weight on the {to_kind} error equals a weight on the {from_kind} error at zero "
            f"signal-to-noise ratio (t = {schedule.num_timesteps - 1})"
        )
    factor = process.conversion(schedule, to_kind, from_kind)[1]
    return table.to("cpu", torch.float64) * factor**2


def snr(schedule: GaussianPath, kind: str = "x0") -> Tensor:
    """SNR_t on the x0 error, equal to weight 1 on the eps error: the simple loss of DDPM.

    Ho et al. 2020, arXiv:2006.11239, eq. 14; on other errors as in Salimans & Ho 2022,
    arXiv:2202.00512, section 4.

    Args:
        schedule: the path, T steps.
        kind: the prediction to whose error the weights apply, one of ``process.KINDS``.

    Returns:
        float64 [T].

    Raises:
        ValueError: unknown kind.
    """
    return convert(schedule, torch.ones_like(schedule.alpha_t), "eps", kind)


def min_snr(schedule: GaussianPath, kind: str = "eps", *, gamma: float = 5.0) -> Tensor:
    """Min-SNR: min(SNR_t, gamma) on the x0 error (Hang et al. 2023, arXiv:2303.09556).

    This equals min(SNR, gamma) / SNR on the eps error, and min(SNR, gamma) / (SNR + 1) on the v
    error of DDPM's path.

    Args:
        schedule: the path, T steps.
        kind: the prediction to whose error the weights apply, one of ``process.KINDS``.
        gamma: the SNR above which the weight no longer grows.

    Returns:
        float64 [T].

    Raises:
        ValueError: unknown kind, or a gamma that is not positive.
    """
    _check_positive("gamma", gamma)
    # Without signal gamma / SNR is infinite; the clamp gives 1, the limit of the weight.
    return convert(schedule, (gamma / schedule.snr).clamp(max=1), "eps", kind)


def p2(schedule: GaussianPath, kind: str = "eps", *, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """P2: 1 / (k + SNR_t)^gamma on the eps error (Choi et al. 2022, arXiv:2204.00227).

    Args:
        schedule: the path, T steps.
        kind: the prediction to whose error the weights apply, one of ``process.KINDS``.
        k: limits the weight at high noise to k^-gamma.
        gamma: how strongly low noise is weighted down; 0 gives the simple loss.

    Returns:
        float64 [T].

    Raises:
        ValueError: unknown kind, k not positive, or gamma negative.
    """
    _check_positive("k", k)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    return convert(schedule, (k + schedule.snr) ** -gamma, "eps", kind)


def edm(schedule: GaussianPath, kind: str = "x0", *, sigma_data: float = 0.5) -> Tensor:
    """EDM: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the x0 error.

    Karras et al. 2022, arXiv:2206.00364, table 1. With sigma = sigma_t / alpha_t this equals
    SNR_t + 1 / sigma_data^2.

    Args:
        schedule: the path, T steps.
        kind: the prediction to whose error the weights apply, one of ``process.KINDS``.
        sigma_data: standard deviation of the data.

    Returns:
        float64 [T].

    Raises:
        ValueError: unknown kind, a sigma_data that is not positive, or eps or score at a timestep
            without signal.
    """
    _check_positive("sigma_data", sigma_data)
    return convert(schedule, schedule.snr + 1 / sigma_data**2, "x0", kind)


def vlb(schedule: NoiseSchedule, kind: str = "eps", *, variance: str = "fixed_small") -> Tensor:
    """The weights of the variational bound, which turn the squared error into L_t.

    coef_t^2 / (2 variance_t) on the x0 error, coef_t being x_0's coefficient in the posterior's
    mean (Ho et al. 2020, arXiv:2006.11239, eq. 8). With fixed_small and t > 0 this equals
    (SNR_{t-1} - SNR_t) / 2 (Kingma et al. 2021, arXiv:2107.00630). The weight times the mean
    squared error of an image is L_t in nats per dimension, up to terms that do not depend on the
    prediction: log(2 pi variance) / 2 at t = 0 (for a decoder with a density), and the divergence
    due to the variances with fixed_large.

    Args:
        schedule: DDPM's noise schedule, T steps.
        kind: the prediction to whose error the weights apply, one of ``process.KINDS``.
        variance: variance of the model's steps, fixed_small or fixed_large.

    Returns:
        float64 [T].

    Raises:
        TypeError: a schedule without betas.
        ValueError: unknown kind or variance, or eps or score at a timestep without signal.
    """
    check_ddpm(schedule)
    precision = torch.exp(-fixed_log_variance(schedule, variance))
    return convert(schedule, schedule.posterior_mean_coef_x0**2 * precision / 2, "x0", kind)


NAMES: dict[str, Callable[..., Tensor]] = {
    "snr": snr,
    "min_snr": min_snr,
    "p2": p2,
    "edm": edm,
    "vlb": vlb,
}


def weighting(schedule: GaussianPath, kind: str, name: str, **options: Any) -> Tensor:
    """The weighting called ``name``, for the squared error of ``kind``, float64 [T].

    Args:
        schedule: the path, T steps.
        kind: the prediction to whose error the weights apply, one of ``process.KINDS``.
        name: snr, min_snr, p2, edm or vlb; see the functions of these names.
        **options: further arguments of that function, such as gamma.

    Raises:
        ValueError: unknown kind or name.
        TypeError: an option that the weighting does not have.
    """
    check_choice("weighting", name, tuple(NAMES))
    return NAMES[name](schedule, kind, **options)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value}")
