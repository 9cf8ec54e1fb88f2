"""Deterministic jumps along the probability-flow ODE, which distillation learns from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.common.checks import wide_dtype
from fastdiff.common.model import Model
from fastdiff.losses.prediction import predict
from fastdiff.process import linear, x0_and_eps
from fastdiff.schedules import GaussianPath

CLEAN = -1  # the timestep of images without noise


def levels(path: GaussianPath, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at timesteps -1..T-1, float64 like ``t``; -1 is the clean image, 1 and 0.

    Raises:
        TypeError: t that is not int64.
        IndexError: a timestep outside -1..T-1.
    """
    if t.dtype != torch.int64:
        raise TypeError(f"timesteps must be int64, got {t.dtype}")
    last = path.num_timesteps - 1
    if t.numel() and not CLEAN <= int(t.min()) <= int(t.max()) <= last:
        raise IndexError(f"timesteps must lie in -1..{last}, got {t.tolist()}")
    alphas, sigmas = path.coefficients(t.device, torch.float64)
    at, clean = t.clamp(min=0), t == CLEAN
    return alphas[at].masked_fill(clean, 1.0), sigmas[at].masked_fill(clean, 0.0)


def check_falls(t: Tensor, s: Tensor, names: str) -> None:
    """ValueError unless every jump from ``t`` to ``s``, int64 [N], leads to less noise."""
    if t.shape != s.shape or not bool((s < t).all()):
        raise ValueError(
            f"{names} must be as many timesteps, each below the one it is reached from, got "
            f"{s.tolist()} from {t.tolist()}"
        )


def ddim_jump(
    path: GaussianPath, model: Model, kind: str, x_t: Tensor, t: Tensor, s: Tensor, **cond: Any
) -> Tensor:
    """x_s = alpha_s x_0 + sigma_s eps by the model's prediction at x_t.

    One step of DDIM without noise (Song et al. 2021, arXiv:2010.02502, eq. 12).

    Args:
        path: the path of the noised images.
        model: (x_t, label, **cond) -> prediction of ``kind``, like x_t.
        kind: one of ``process.KINDS``.
        x_t: images at timesteps ``t``, [N, C, ...].
        t: int64 [N], in 0..T-1.
        s: int64 [N], in -1..T-1.
        **cond: keyword arguments of the model.

    Returns:
        Images in the wide dtype of ``x_t``.
    """
    wide = wide_dtype(x_t.dtype)
    prediction, _ = predict(model, x_t, path.labels_of(t, wide), cond)
    (x_of_x, x_of_out), (eps_of_x, eps_of_out) = x0_and_eps(kind, *levels(path, t))
    alpha, sigma = levels(path, s)
    form = alpha * x_of_x + sigma * eps_of_x, alpha * x_of_out + sigma * eps_of_out
    return linear(form, x_t, prediction)
