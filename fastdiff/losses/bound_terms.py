"""The terms of the variational bound on -log p(x_0) (Ho et al. 2020, arXiv:2006.11239, eq. 5).

    L_T = KL(q(x_T | x_0) || N(0, I))                              prior_term
    L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), t > 0     bound_term
    L_0 = -log p(x_0 | x_0's first noised image), at t = 0         bound_term

Here t counts from 0: L_t belongs to the step from x_t, and the bound of T steps is the sum of L_T
and the T terms L_0..L_{T-1}. Each term is a mean over an image's dimensions, in bits or nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff import process
from fastdiff.common.checks import wide_dtype
from fastdiff.common.inputs import check_choice
from fastdiff.losses.discretized_gaussian import (
    discretized_gaussian_log_likelihood,
    normal_kl,
    normal_log_density,
)
from fastdiff.losses.prediction import check_x0, image_mean
from fastdiff.losses.variance import FIXED_VARIANCES, check_ddpm, model_variance
from fastdiff.samplers.ddpm import VARIANCES
from fastdiff.schedules import NoiseSchedule

NATS_PER_UNIT = {"bits": math.log(2), "nats": 1.0}


def prior_term(schedule: NoiseSchedule, x0: Tensor, *, unit: str = "bits") -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of each image, [N], per dimension.

    Args:
        schedule: DDPM's noise schedule, T steps.
        x0: clean images, [N, C, ...], floating point.
        unit: bits or nats.

    Raises:
        TypeError: images that are not floating point, or a schedule without betas.
        ValueError: images of another shape, or an unknown unit.
    """
    check_ddpm(schedule)
    check_x0(x0)
    check_choice("unit", unit, tuple(NATS_PER_UNIT))
    abar = schedule.alphas_cumprod[-1].item()
    # (-1 - log variance + variance) / 2 for the variance 1 - abar, without rounding 1 - abar
    of_variance = -(math.log1p(-abar) + abar) / 2 if abar < 1 else math.inf
    power = image_mean(x0.to(wide_dtype(x0.dtype)) ** 2)
    return (of_variance + abar / 2 * power) / NATS_PER_UNIT[unit]


def bound_term(
    schedule: NoiseSchedule,
    model_mean: Tensor,
    model_log_variance: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    discrete: bool = True,
    unit: str = "bits",
) -> Tensor:
    """L_t of each image, which is L_0 where t = 0, [N], per dimension.

    Args:
        schedule: DDPM's noise schedule, T steps.
        model_mean: mean of p(x_{t-1} | x_t), [N, C, ...].
        model_log_variance: its log-variance, [N, C, ...] or [N, 1, ...].
        x0: clean images, [N, C, ...], floating point.
        x_t: the noised images, [N, C, ...].
        t: timesteps, int64 [N], in 0..T-1.
        discrete: x0 are 8-bit values in [-1, 1], and L_0 is -log of their probability (eq. 13). If
            False, x0 are continuous data, and L_0 is -log of their density.
        unit: bits or nats.

    Returns:
        float32 (float64 if x0 is float64), [N].

    Raises:
        TypeError: images that are not floating point, t not int64, or a schedule without betas.
        ValueError: shapes that do not fit, or an unknown unit.
        IndexError: a timestep outside 0..T-1 (CPU tensors only).
    """
    check_ddpm(schedule)
    check_x0(x0)
    check_choice("unit", unit, tuple(NATS_PER_UNIT))
    if model_mean.shape != x0.shape:
        raise ValueError(
            f"model_mean must have shape {tuple(x0.shape)}, got {tuple(model_mean.shape)}"
        )
    narrow = (x0.shape[0], *[1] * (x0.ndim - 1))
    if model_log_variance.shape not in (x0.shape, narrow):
        raise ValueError(
            f"model_log_variance must have shape {tuple(x0.shape)} or {narrow}, "
            f"got {tuple(model_log_variance.shape)}"
        )
    wide = wide_dtype(x0.dtype)
    x0 = x0.to(wide)
    mean, _, log_variance = process.q_posterior(schedule, x0, x_t.to(wide), t)
    divergence = normal_kl(mean, log_variance, model_mean, model_log_variance)
    decoder = discretized_gaussian_log_likelihood if discrete else normal_log_density
    surprise = -decoder(x0, model_mean, model_log_variance)
    return torch.where(t == 0, image_mean(surprise), image_mean(divergence)) / NATS_PER_UNIT[unit]


@dataclass(frozen=True)
class ReverseSteps:
    """The reverse steps p(x_{t-1} | x_t) that a model's output defines.

    Attributes:
        schedule: DDPM's noise schedule, T steps.
        kind: what the model predicts, one of ``process.KINDS``.
        variance: fixed_small, fixed_large, learned or learned_range.
        clip: limit the predicted x_0 to [-1, 1].
        discrete: see :func:`bound_term`.

    Raises:
        TypeError: a schedule without betas.
        ValueError: unknown kind or variance.
    """

    schedule: NoiseSchedule
    kind: str
    variance: str
    clip: bool
    discrete: bool

    def __post_init__(self) -> None:
        check_ddpm(self.schedule)
        process.check_kind(self.kind)
        check_choice("variance", self.variance, VARIANCES)

    @property
    def learned(self) -> bool:
        """Whether the model's output gives the variance."""
        return self.variance not in FIXED_VARIANCES

    def x0(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The predicted x_0, in the prediction's dtype."""
        x_t = x_t.to(prediction.dtype)
        x0 = process.to_x0(self.schedule, x_t, t, prediction, self.kind)
        return x0.clamp(-1, 1) if self.clip else x0

    def term(
        self, predicted: Tensor, v: Tensor | None, x0: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """L_t in bits per dimension, [N].

        Args:
            predicted: the x_0 that the model predicts, [N, C, ...].
            v: the model's values of the variance, [N, C, ...]; None for a fixed variance.
            x0: clean images, [N, C, ...].
            x_t: the noised images, [N, C, ...].
            t: timesteps, int64 [N].
        """
        mean, _, _ = process.q_posterior(self.schedule, predicted, x_t.to(predicted.dtype), t)
        log_variance = model_variance(self.schedule, x_t if v is None else v, t, self.variance)
        return bound_term(self.schedule, mean, log_variance, x0, x_t, t, discrete=self.discrete)
