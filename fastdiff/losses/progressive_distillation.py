"""Progressive distillation: a student does in one step what its teacher does in two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.common.checks import wide_dtype
from fastdiff.common.model import Model
from fastdiff.losses.jumps import check_falls, ddim_jump, levels
from fastdiff.losses.noising import noised
from fastdiff.losses.prediction import check_x0, image_mean, predict
from fastdiff.process import check_kind, linear, x0_and_eps
from fastdiff.schedules import GaussianPath


def progressive_target(
    path: GaussianPath, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """The x_0 for which one step of DDIM leads from x_t to x_s.

    (x_s - sigma_s / sigma_t x_t) / (alpha_s - sigma_s / sigma_t alpha_t) (Salimans & Ho 2022,
    arXiv:2202.00512, eq. 7).

    Args:
        path: the path of the noised images.
        x_t: images at timesteps ``t``, [N, ...].
        x_s: images at timesteps ``s``, like x_t.
        t: int64 [N], in 0..T-1.
        s: int64 [N], below ``t``, in -1..T-1.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(path, t), levels(path, s)
    share = sigma_s / sigma_t
    scale = 1 / (alpha_s - share * alpha_t)
    return linear((scale, -scale * share), x_s, x_t)


def progressive_loss(
    path: GaussianPath,
    student: Model,
    teacher: Model,
    x0: Tensor,
    t: Tensor,
    middle: Tensor,
    s: Tensor,
    noise: Tensor,
    *,
    kind: str = "v",
    teacher_kind: str | None = None,
    **cond: Any,
) -> Tensor:
    """max(snr_t, 1) |x_0 of the student - x_0 of the teacher's two steps|^2 of each image, [N].

    Salimans & Ho 2022, arXiv:2202.00512, algorithm 2, with the truncated SNR weights of its section
    4. The teacher goes from t to ``middle`` to ``s`` by DDIM; the student is to go there at once.

    Args:
        path: the path of the noised images.
        student: the network in training, (x_t, label, **cond) -> prediction of ``kind``.
        teacher: the network that it learns from.
        x0: clean images, [N, C, ...], floating point.
        t: int64 [N], in 0..T-1.
        middle: int64 [N], below ``t``.
        s: int64 [N], below ``middle``; -1 is the clean image.
        noise: standard normal noise, like ``x0``; or seeds, int64 [N, 2], see ``noising``.
        kind: what the student predicts, one of ``process.KINDS``. Without signal at t, eps and
            score say nothing of x_0.
        teacher_kind: what the teacher predicts; None for ``kind``.
        **cond: keyword arguments of both networks.

    Returns:
        float32 (float64 for float64 images), [N].

    Raises:
        TypeError, ValueError, IndexError: images, timesteps or outputs that do not fit, or an
            unknown kind.
    """
    check_x0(x0)
    check_kind(kind)
    check_falls(t, middle, "middle")
    check_falls(middle, s, "s")
    wide = wide_dtype(x0.dtype)
    x_t = noised(x0, t, noise, *path.coefficients(x0.device, wide))
    with torch.no_grad():
        taught = teacher_kind or kind
        between = ddim_jump(path, teacher, taught, x_t, t, middle, **cond)
        there = ddim_jump(path, teacher, taught, between.to(x0.dtype), middle, s, **cond)
        wanted = progressive_target(path, x_t.to(wide), there, t, s)
    output, _ = predict(student, x_t, path.labels_of(t, wide), cond)
    alpha, sigma = levels(path, t)
    form, _ = x0_and_eps(kind, alpha, sigma)
    found = linear(form, x_t, output)
    weight = ((alpha / sigma) ** 2).clamp(min=1).to(found.device, found.dtype)
    return weight * image_mean((found - wanted).square())
