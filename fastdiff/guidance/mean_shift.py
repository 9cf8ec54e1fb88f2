"""Guidance that shifts the mean of a sampler's step, in place of the score.

A step's mean is linear in the prediction. So a shift of the mean is a change of the prediction, by
the shift over the factor that the row of the sampler's table has for the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.common.checks import beside
from fastdiff.common.model import Model, tensor_of
from fastdiff.guidance.energies import LogProb, gradient_of
from fastdiff.samplers import Table
from fastdiff.samplers.ddpm import DDPM


def condition_mean(
    model: Model,
    log_prob: LogProb,
    sampler: DDPM,
    *,
    scale: float = 1.0,
    arguments: Sequence[str] = (),
) -> Callable[..., Tensor]:
    """A model for DDPM's steps: variance * scale * gradient is added to the mean of each.

    Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 1: guided-diffusion's ``condition_mean``.
    ``classifier_guided`` adds the gradient to the score instead (the paper's algorithm 2, for
    DDIM), with which samples follow p(x) p(y | x)^scale more closely in few steps. As in the
    authors' code the variance is that of the step, or 0 in the last step of "fixed_small".

    Args:
        model: ``(x, t, **cond)`` -> the prediction, like x; or with a learned variance [N, 2 C,
            ...], whose second half is not changed.
        log_prob: ``(x, t, **chosen)`` -> [N], see ``classifier_guided``.
        sampler: the sampler that the result is for, of its own ``clip`` None: clipping the guided
            x0 would undo the shift. guided-diffusion clips before; so does a ``model`` from
            ``guidance.denoised``.
        scale: factor of the gradient.
        arguments: names of the keyword arguments that go to ``log_prob`` instead of the model.

    Raises:
        TypeError: another sampler than ddpm.
        ValueError: a sampler that clips, or a scale that is not finite. When called: the errors of
            ``gradient_of``, or a time that is not the sampler's.
    """
    if not isinstance(sampler, DDPM):
        raise TypeError(f"condition_mean is for the sampler ddpm, got {sampler!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    table = sampler.table
    check_unclipped(table)
    fixed = table.column("logvar").clone()
    if sampler.variance == "fixed_small":
        fixed[-1] = -math.inf  # of the last step, from x_1 to x_0
    log_variance, of_v = fixed, table.column("logvar_v")
    names = tuple(arguments)

    def guided(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        chosen = {name: cond.pop(name) for name in names if name in cond}
        prediction, *values = tensor_of(model(x, t, **cond)).split(x.shape[1], dim=1)
        gradient = gradient_of(log_prob, x, t, **chosen)
        row = row_at(table, t)
        variance = beside(log_variance.to(x.device)[row], x)
        if values:
            variance = variance + beside(of_v.to(x.device)[row], x) * values[0]
        shift = scale * variance.exp() * gradient
        return shifted(table, row, x, prediction, shift, values)

    return guided


def check_unclipped(table: Table) -> None:
    """ValueError if any row of the table clips x0 or thresholds it."""
    if bool((table.column("clip_min") > -math.inf).any() | (table.column("quantile") > 0).any()):
        raise ValueError(
            f"the sampler {table.name} clips x0 after guidance, which would undo the shift of the "
            "mean: make it with clip=None, and clip the model's x0 by guidance.denoised"
        )


def row_at(table: Table, t: Tensor) -> Tensor:
    """The rows of a table whose times are ``t``, int64 [N] on t's device.

    Raises:
        ValueError: a time that no row has, or that two rows have.
    """
    times = table.timesteps.to(t.device)
    same = times == t.reshape(-1, 1).to(times.dtype)  # [N, R]
    if not bool((same.sum(1) == 1).all()):
        raise ValueError(f"the times {t.tolist()} are not those of single rows of {table.name}")
    return same.int().argmax(1)


def shifted(
    table: Table, row: Tensor, x: Tensor, prediction: Tensor, shift: Tensor, values: list[Tensor]
) -> Tensor:
    """The model's output that moves the mean of each image's step by ``shift``, like x.

    Args:
        table: the sampler's table.
        row: the row of each image, int64 [N].
        x: images [N, C, ...].
        prediction: like x.
        shift: like x.
        values: the learned variance's channels, if there are any.
    """
    of_prediction = table.column("out_x0") * table.column("x0_m") + table.column("out_m")
    factor = beside(of_prediction.to(x.device)[row], x)
    moved = (prediction + shift / factor).to(x.dtype)
    return torch.cat([moved, *values], dim=1) if values else moved
