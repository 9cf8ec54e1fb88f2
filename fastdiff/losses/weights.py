"""Weights of the timesteps, as float64 tables [T], and how they pass from one loss to another.

Given x_t, predictions of all kinds are linear in each other: kind_t = a_t x_t + b_t other_t. Errors
then differ by b_t, so the squared error of a kind is b_t^2 times that of the other, and

    weight on the other's error = b_t^2 * weight on the kind's error

leaves the loss the same (:func:`convert`). With alpha_t and sigma_t for sqrt(abar_t) and
sqrt(1 - abar_t), and SNR_t = alpha_t^2 / sigma_t^2,

    |x0 error|^2 = |eps error|^2 sigma^2 / alpha^2  = |eps error|^2 / SNR
    |v error|^2  = |x0 error|^2 (alpha^2 + sigma^2)^2 / sigma^2,  on DDPM's path (SNR + 1) times it
    |score error|^2 = |eps error|^2 / sigma^2
    |flow error|^2  = |x0 error|^2 (alpha + sigma)^2 / sigma^2

The weightings below are one function of SNR each. ``kind`` only says on whose error it is put: the
loss is the same for every kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import process
from fastdiff.losses.variance import check_ddpm, fixed_log_variance
from fastdiff.samplers.sampler import check_choice
from fastdiff.schedules import GaussianPath, NoiseSchedule


def convert(schedule: GaussianPath, table: Tensor, from_kind: str, to_kind: str) -> Tensor:
    """The weights on ``to_kind``'s squared error that give the loss of ``table``.

    Args:
        schedule: the path, T steps.
        table: weights on the squared error of ``from_kind``, [T], floating point.
        from_kind: one of ``process.KINDS``.
        to_kind: likewise.

    Returns:
        float64 [T].

    Raises:
        TypeError: ``table`` is not floating point.
        ValueError: an unknown kind, a table of another shape, or eps or score wanted of a kind that
            tells x_0 at a timestep without signal, where no error of eps is one of x_0.
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
            f"a weight on the {from_kind} error has none like it on that of {to_kind} at zero "
            f"signal-to-noise ratio (t = {schedule.num_timesteps - 1})"
        )
    factor = process.conversion(schedule, to_kind, from_kind)[1]
    return table.to("cpu", torch.float64) * factor**2


def snr(schedule: GaussianPath, kind: str = "x0") -> Tensor:
    """SNR_t on the x0 error, which is 1 on the eps error: the simple loss of DDPM.

    Ho et al. 2020, arXiv:2006.11239, eq. 14; on other errors as in Salimans & Ho 2022,
    arXiv:2202.00512, section 4.

    Args:
        schedule: the path, T steps.
        kind: whose error the weights are for.

    Returns:
        float64 [T].

    Raises:
        ValueError: unknown kind.
    """
    return convert(schedule, torch.ones_like(schedule.alpha_t), "eps", kind)


def min_snr(schedule: GaussianPath, kind: str = "eps", *, gamma: float = 5.0) -> Tensor:
    """Min-SNR: min(SNR_t, gamma) on the x0 error (Hang et al. 2023, arXiv:2303.09556).

    That is min(SNR, gamma) / SNR on the eps error, and min(SNR, gamma) / (SNR + 1) on the v error
    of DDPM's path.

    Args:
        schedule: the path, T steps.
        kind: whose error the weights are for.
        gamma: where the weight stops growing.

    Returns:
        float64 [T].

    Raises:
        ValueError: unknown kind, or a gamma that is not positive.
    """
    _check_positive("gamma", gamma)
    # gamma / SNR, infinite without signal, is cut to 1 there: the limit.
    return convert(schedule, (gamma / schedule.snr).clamp(max=1), "eps", kind)


def p2(schedule: GaussianPath, kind: str = "eps", *, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """P2: 1 / (k + SNR_t)^gamma on the eps error (Choi et al. 2022, arXiv:2204.00227).

    Args:
        schedule: the path, T steps.
        kind: whose error the weights are for.
        k: bounds the weight at high noise.
        gamma: how strongly low noise is weighted down; 0 is the simple loss.

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

    Karras et al. 2022, arXiv:2206.00364, table 1, with sigma = sigma_t / alpha_t, so that it is
    SNR_t + 1 / sigma_data^2.

    Args:
        schedule: the path, T steps.
        kind: whose error the weights are for.
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
    """The variational bound's own weights: those that turn the error into L_t.

    coef_t^2 / (2 variance_t) on the x0 error, coef_t being x_0's coefficient in the posterior's
    mean (Ho et al. 2020, arXiv:2006.11239, eq. 8); with fixed_small, for t > 0, that is
    (SNR_{t-1} - SNR_t) / 2 (Kingma et al. 2021, arXiv:2107.00630). Times the mean
    squared error of an image it gives L_t in nats per dimension, but for what the prediction does
    not change: at t = 0 log(2 pi variance) / 2 (of a decoder with a density), and with fixed_large
    the divergence due to the variances.

    Args:
        schedule: of DDPM, T steps.
        kind: whose error the weights are for.
        variance: of the model's steps, fixed_small or fixed_large.

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
    """The weights of that name on the squared error of ``kind``, float64 [T].

    Args:
        schedule: the path, T steps.
        kind: whose error they are for, one of ``process.KINDS``.
        name: snr, min_snr, p2, edm or vlb; see the functions of these names.
        **options: their own arguments, such as gamma.

    Raises:
        ValueError: unknown kind or name.
        TypeError: an option that the weighting does not have.
    """
    check_choice("weighting", name, tuple(NAMES))
    return NAMES[name](schedule, kind, **options)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value}")
