"""The variance of the model's steps p(x_{t-1} | x_t), fixed or learned (arXiv:2102.09672)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.checks import beside, check_floating, check_timesteps, wide_dtype
from fastdiff.common.inputs import check_choice
from fastdiff.samplers.ddpm import VARIANCES
from fastdiff.schedules import GaussianPath, NoiseSchedule

FIXED_VARIANCES = ("fixed_small", "fixed_large")


def fixed_log_variance(schedule: NoiseSchedule, kind: str) -> Tensor:
    """Log of beta_tilde_t (fixed_small) or beta_t (fixed_large), float64 [T].

    The first entry is log beta_tilde_1 for both kinds: beta_tilde_0 is 0, and Nichol & Dhariwal use
    the same decoder variance for both.

    Args:
        schedule: DDPM's noise schedule, T steps.
        kind: fixed_small or fixed_large.

    Raises:
        TypeError: a schedule without betas.
        ValueError: another kind.
    """
    check_ddpm(schedule)
    check_choice("fixed variance", kind, FIXED_VARIANCES)
    small = schedule.posterior_log_variance_clipped
    return small if kind == "fixed_small" else torch.cat([small[:1], schedule.betas[1:].log()])


def model_variance(schedule: NoiseSchedule, v: Tensor, t: Tensor, kind: str) -> Tensor:
    """Log-variance of p(x_{t-1} | x_t).

    The kind fixed_small or fixed_large gives :func:`fixed_log_variance`; learned gives v itself;
    learned_range gives frac log beta_t + (1 - frac) log beta_tilde_t with frac = (v + 1) / 2, which
    lies between the two for v in [-1, 1] (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15).

    Args:
        schedule: DDPM's noise schedule, T steps.
        v: the second half of the model's channels, [N, C, ...]. A fixed kind uses only its rank,
            dtype and device, so that x_t may be passed.
        t: timesteps, int64 [N], in 0..T-1.
        kind: fixed_small, fixed_large, learned or learned_range.

    Returns:
        [N, C, ...] for a learned kind, else [N, 1, ...]; float32 (float64 for float64 v).

    Raises:
        TypeError: v not floating point, t not int64, or a schedule without betas.
        ValueError: unknown kind, or a t of another shape.
        IndexError: a timestep outside 0..T-1 (CPU tensors only).
    """
    check_ddpm(schedule)
    check_choice("variance", kind, VARIANCES)
    check_floating(v, "v")
    check_timesteps(t, v, schedule.num_timesteps)
    if kind == "learned":
        return v.to(wide_dtype(v.dtype))
    if kind in FIXED_VARIANCES:
        return beside(fixed_log_variance(schedule, kind).to(v.device)[t], v)
    small, large = schedule.posterior_log_variance_clipped, schedule.betas.log()
    middle, half = (table.to(v.device)[t] for table in ((small + large) / 2, (large - small) / 2))
    return beside(middle, v) + beside(half, v) * v


def check_ddpm(schedule: GaussianPath) -> None:
    """TypeError unless the schedule has betas, which define the steps and their variances."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"the variational bound needs a NoiseSchedule, got {type(schedule).__name__}"
        )
