"""The loss of DDPM: the mean squared error of a prediction (arXiv:2006.11239, eq. 14)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff import process
from fastdiff.common.checks import wide_dtype
from fastdiff.common.model import Model
from fastdiff.losses.noising import noised, squared_error
from fastdiff.losses.prediction import check_x0, predict
from fastdiff.losses.targets import target_of, weight_on
from fastdiff.schedules import GaussianPath


def simple_loss(
    schedule: GaussianPath,
    model: Model,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    kind: str = "eps",
    weight: Tensor | None = None,
    **cond: Any,
) -> Tensor:
    """weight_t |target - prediction|^2, averaged over each image (Ho et al. 2020, eq. 14).

    Args:
        schedule: the path of the noised images, of DDPM or rectified flow.
        model: callable (x_t, label, **cond) -> prediction of ``kind``, [N, C, ...]; the label is
            the schedule's ``label`` of the timestep, as in sampling.
        x0: clean images, [N, C, ...], floating point.
        t: timesteps, int64 [N], in 0..T-1.
        noise: standard normal noise, like ``x0``; or seeds, int64 [N, 2], see ``noising``.
        kind: what the model predicts, one of ``process.KINDS``. At a timestep without signal a
            model of eps learns nothing about x_0.
        weight: a weight for each timestep, float64 [T], as :func:`weighting` returns; None is 1.
        **cond: keyword arguments of the model.

    Returns:
        The loss of each image, [N], float32 (float64 for float64 images).

    Raises:
        TypeError: images or weights that are not floating point, t not int64, or a model that
            returns no tensor.
        ValueError: shapes that do not fit, or an unknown kind.
        IndexError: a timestep outside 0..T-1 (CPU tensors only).
    """
    process.check_kind(kind)
    check_x0(x0)
    x_t = noised(x0, t, noise, *schedule.coefficients(x0.device, wide_dtype(x0.dtype)))
    label = schedule.labels_of(t, wide_dtype(x0.dtype))
    prediction, _ = predict(model, x_t, label, cond, narrow=True)
    return weighted_error(schedule, prediction, x0, t, noise, kind, weight)


def weighted_error(
    schedule: GaussianPath,
    prediction: Tensor,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    kind: str,
    weight: Tensor | None,
) -> Tensor:
    """The loss of :func:`simple_loss` for a given prediction, [N]."""
    wide = wide_dtype(x0.dtype)
    of_x0, of_noise, weights = target_of(schedule, kind, x0.device, wide)
    if weight is not None:
        weights = weight_on(_checked(weight, schedule.num_timesteps), x0.device, wide)
    return squared_error(prediction, x0, t, noise, of_x0, of_noise, weights)


def _checked(weight: Tensor, num_timesteps: int) -> Tensor:
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating point tensor, got {given}")
    if weight.shape != torch.Size([num_timesteps]):
        raise ValueError(
            f"weight must have shape [{num_timesteps}], one per timestep, got {tuple(weight.shape)}"
        )
    return weight
