"""Losses on the variational bound, and the bound itself (arXiv:2006.11239, arXiv:2102.09672).

``bound_terms`` defines the terms L_t; all results of this module are in bits per dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.common.checks import wide_dtype
from fastdiff.common.conditions import Conditions
from fastdiff.common.inputs import check_max_batch, checked_seeds
from fastdiff.common.model import Model
from fastdiff.common.progress import progress_bar
from fastdiff.losses.bound_terms import ReverseSteps, bound_term, prior_term
from fastdiff.losses.discretized_gaussian import discretized_gaussian_log_likelihood, normal_kl
from fastdiff.losses.noising import noised
from fastdiff.losses.prediction import check_x0, image_mean, predict
from fastdiff.losses.simple import weighted_error
from fastdiff.schedules import NoiseSchedule

__all__ = [
    "BitsPerDim", "bits_per_dim", "bound_term", "discretized_gaussian_log_likelihood",
    "hybrid_loss", "normal_kl", "prior_term", "rescaled_kl", "vlb_loss",
]  # fmt: skip


def vlb_loss(
    schedule: NoiseSchedule,
    model: Model,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    kind: str = "eps",
    variance: str = "learned_range",
    clip: bool = False,
    discrete: bool = True,
    **cond: Any,
) -> Tensor:
    """L_t of one timestep for each image, [N], in bits per dimension.

    The mean of p(x_{t-1} | x_t) is the mean of q(x_{t-1} | x_t, x_0) at the x_0 that the model
    predicts.

    Args:
        schedule: DDPM's noise schedule, T steps.
        model: callable (x_t, label, **cond) -> [N, C, ...], the prediction of ``kind``, where the
            label is the schedule's ``label`` of the timestep. With a learned variance it returns
            [N, 2 C, ...]: the prediction, then v of :func:`model_variance`.
        x0: clean images, [N, C, ...], floating point.
        t: timesteps, int64 [N], in 0..T-1.
        noise: standard normal noise, like ``x0``; or seeds, int64 [N, 2], see ``noising``.
        kind: what the model predicts, one of ``process.KINDS``.
        variance: fixed_small, fixed_large, learned or learned_range.
        clip: limit the predicted x_0 to [-1, 1].
        discrete: x0 are 8-bit values, see :func:`bound_term`.
        **cond: keyword arguments of the model.

    Returns:
        float32 (float64 for float64 images), [N].

    Raises:
        TypeError: images that are not floating point, t not int64, a schedule without betas, or a
            model that returns no tensor.
        ValueError: shapes that do not fit, an unknown kind or variance, or a prediction of eps or
            score at a timestep without signal.
        IndexError: a timestep outside 0..T-1 (CPU tensors only).
    """
    reverse = ReverseSteps(schedule, kind, variance, clip, discrete)
    check_x0(x0)
    wide = wide_dtype(x0.dtype)
    x_t = noised(x0, t, noise, *schedule.coefficients(x0.device, wide))
    label = schedule.labels_of(t, wide)
    prediction, v = predict(model, x_t, label, cond, learned=reverse.learned)
    return reverse.term(reverse.x0(x_t, t, prediction), v, x0, x_t, t)


def rescaled_kl(schedule: NoiseSchedule, *args: Any, **options: Any) -> Tensor:
    """T times :func:`vlb_loss`: for uniform t an unbiased estimate of the bound without L_T.

    This is the loss L_vlb of Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 4 and 18. L_T is left
    out because it does not depend on the model. Arguments, result and errors are those of
    :func:`vlb_loss`.
    """
    return schedule.num_timesteps * vlb_loss(schedule, *args, **options)


def hybrid_loss(
    schedule: NoiseSchedule,
    model: Model,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    kind: str = "eps",
    variance: str = "learned_range",
    weight: Tensor | None = None,
    vlb_weight: float | None = None,
    clip: bool = False,
    discrete: bool = True,
    **cond: Any,
) -> Tensor:
    """L_simple + T / 1000 L_t of each image, [N]: a loss for models that learn their variance.

    Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16, with lambda = 0.001; T L_t is the estimate of
    the bound. The bound's gradient reaches only the variance; the mean is learned from L_simple
    alone. L_t is in bits per dimension, as in the authors' code.

    Args:
        schedule: DDPM's noise schedule, T steps.
        model: callable (x_t, t, **cond) -> [N, 2 C, ...], see :func:`vlb_loss`.
        x0: clean images, [N, C, ...], floating point.
        t: timesteps, int64 [N], in 0..T-1.
        noise: standard normal noise, like ``x0``; or seeds, int64 [N, 2], see ``noising``.
        kind: what the model predicts, one of ``process.KINDS``.
        variance: learned or learned_range.
        weight: weights of L_simple, float64 [T], see :func:`simple_loss`.
        vlb_weight: factor of L_t, at least 0; None is T / 1000. The authors' code without its
            rescaled losses has 1.
        clip: limit the predicted x_0 to [-1, 1] in L_t.
        discrete: x0 are 8-bit values, see :func:`bound_term`.
        **cond: keyword arguments of the model.

    Returns:
        float32 (float64 for float64 images), [N].

    Raises:
        TypeError, ValueError, IndexError: those of :func:`vlb_loss`; ValueError for a fixed
            variance or a negative vlb_weight.
    """
    reverse = ReverseSteps(schedule, kind, variance, clip, discrete)
    check_x0(x0)
    if not reverse.learned:
        raise ValueError(f"the hybrid loss is for a learned variance, got {variance!r}")
    factor = schedule.num_timesteps / 1000 if vlb_weight is None else vlb_weight
    if not factor >= 0:
        raise ValueError(f"vlb_weight must be at least 0, got {vlb_weight}")
    wide = wide_dtype(x0.dtype)
    x_t = noised(x0, t, noise, *schedule.coefficients(x0.device, wide))
    prediction, v = predict(model, x_t, schedule.labels_of(t, wide), cond, learned=True)
    simple = weighted_error(schedule, prediction, x0, t, noise, kind, weight)
    vlb = reverse.term(reverse.x0(x_t, t, prediction.detach()), v, x0, x_t, t)
    return simple + factor * vlb


@dataclass(frozen=True)
class BitsPerDim:
    """The variational bound of each image, float64 on the images' device.

    Attributes:
        total: the bound on -log2 p(x_0) per dimension, [N].
        prior: L_T, bits per dimension, [N].
        terms: L_t at [:, t], bits per dimension, [N, T].
        x0_mse: mean squared error of the predicted x_0, [N, T].
        eps_mse: mean squared error of the noise that this x_0 implies, SNR_t x0_mse, [N, T].
    """

    total: Tensor
    prior: Tensor
    terms: Tensor
    x0_mse: Tensor
    eps_mse: Tensor


@torch.no_grad()
def bits_per_dim(
    model: Model,
    schedule: NoiseSchedule,
    x0: Tensor,
    *,
    kind: str = "eps",
    variance: str = "fixed_small",
    clip: bool = True,
    discrete: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **cond: Any,
) -> BitsPerDim:
    """The variational bound of each image, with one model call per timestep.

    The noise depends only on the seed, the image's number and t, not on ``batch_size``.

    Args:
        model: see :func:`vlb_loss`. Put a module into eval mode before the call.
        schedule: DDPM's noise schedule, T steps.
        x0: clean images, [N, C, ...], floating point, in [-1, 1] if they are discrete.
        kind: what the model predicts, one of ``process.KINDS``.
        variance: fixed_small, fixed_large, learned or learned_range.
        clip: limit the predicted x_0 to [-1, 1]; set False for continuous data outside it.
        discrete: x0 are 8-bit values, see :func:`bound_term`.
        batch_size: the largest number of images in a model call, None for all.
        seed: seed of the noise.
        progress: show a progress bar on standard error.
        **cond: keyword arguments of the model, as in ``fastdiff.sample``. With ``batch_size``, mark
            tensors by ``fastdiff.PerImage`` or ``fastdiff.Shared`` to split or to share them.

    Returns:
        The bound and its parts.

    Raises:
        TypeError, ValueError: those of :func:`vlb_loss`; ValueError for discrete images outside
            [-1, 1], or for an unmarked tensor among ``cond`` that may or may not be per image.
    """
    reverse = ReverseSteps(schedule, kind, variance, clip, discrete)
    check_x0(x0)
    check_max_batch(batch_size)
    if discrete and x0.numel():
        low, high = (value.item() for value in x0.aminmax())
        if not -1 <= low <= high <= 1:
            raise ValueError(f"discrete x0 must lie in [-1, 1], got values from {low} to {high}")
    images, steps = x0.shape[0], schedule.num_timesteps
    seeds = checked_seeds(seed, None, images).to(x0.device)
    size = max(1, images if batch_size is None else batch_size)
    conditions = Conditions(cond, None, images, cut=size < images)
    parts = [slice(first, first + size) for first in range(0, images, size)]
    terms, x0_mse = torch.empty(2, images, steps, dtype=torch.float64, device=x0.device)
    rows = torch.arange(steps, device=x0.device)
    wide = wide_dtype(x0.dtype)
    tables = schedule.coefficients(x0.device, wide)
    with progress_bar(total=len(parts) * steps, desc="bits per dim", shown=progress) as bar:
        for part in parts:
            part_cond, clean, part_seeds = conditions.part(part), x0[part], seeds[part]
            for step in reversed(range(steps)):
                row = rows[step : step + 1]
                t = row.repeat(len(clean))
                x_t = ops.q_sample_from_seed(clean, t, part_seeds, row, *tables)
                label = schedule.labels_of(t, wide)
                prediction, v = predict(model, x_t, label, part_cond, learned=reverse.learned)
                predicted = reverse.x0(x_t, t, prediction)
                terms[part, step] = reverse.term(predicted, v, clean, x_t, t)
                x0_mse[part, step] = image_mean((predicted - clean) ** 2)
                bar.update()
    prior = prior_term(schedule, x0.double())
    eps_mse = x0_mse * schedule.snr.to(x0.device)
    return BitsPerDim(prior + terms.sum(1), prior, terms, x0_mse, eps_mse)
