"""The weighted squared error of a prediction against p x_0 + q noise; the target is never stored.

``denoising_loss`` takes the noise as a tensor. ``denoising_loss_from_seed`` computes the noise from
a seed while it computes the loss, so the noise is never in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.checks import (
    check_device,
    check_floating,
    check_like,
    check_timesteps,
    wide_dtype,
)
from fastdiff.ops import reference
from fastdiff.ops.dispatch import (
    check_devices,
    differentiable,
    dispatch,
    fake_like,
    refuse_to_differentiate,
)
from fastdiff.ops.gpu import on_gpu
from fastdiff.ops.philox_normal import check_row, check_seed

torch.library.define(
    "fastdiff::denoising_loss",
    "(Tensor prediction, Tensor? x0, Tensor? noise, Tensor t, Tensor target_x0, "
    "Tensor target_noise, Tensor weight) -> Tensor",
)
torch.library.define(
    "fastdiff::denoising_loss_backward",
    "(Tensor grad, Tensor prediction, Tensor? x0, Tensor? noise, Tensor t, Tensor target_x0, "
    "Tensor target_noise, Tensor weight) -> Tensor",
)
torch.library.define(
    "fastdiff::denoising_loss_from_seed",
    "(Tensor prediction, Tensor? x0, Tensor seed, Tensor row, Tensor t, Tensor target_x0, "
    "Tensor target_noise, Tensor weight) -> Tensor",
)
torch.library.define(
    "fastdiff::denoising_loss_from_seed_backward",
    "(Tensor grad, Tensor prediction, Tensor? x0, Tensor seed, Tensor row, Tensor t, "
    "Tensor target_x0, Tensor target_noise, Tensor weight) -> Tensor",
)

_kernel = differentiable(torch.ops.fastdiff.denoising_loss.default)
_backward_kernel = differentiable(torch.ops.fastdiff.denoising_loss_backward.default)
_kernel_from_seed = differentiable(torch.ops.fastdiff.denoising_loss_from_seed.default)
_backward_kernel_from_seed = differentiable(
    torch.ops.fastdiff.denoising_loss_from_seed_backward.default
)


def denoising_loss(
    prediction: Tensor,
    x0: Tensor | None,
    noise: Tensor | None,
    t: Tensor,
    target_x0: Tensor,
    target_noise: Tensor,
    weight: Tensor,
) -> Tensor:
    """weight_t mean((prediction - p_t x_0 - q_t noise)^2) of each image.

    With p and q of a parametrisation it is the loss of Ho et al. 2020 (arXiv:2006.11239, eq. 14),
    weighted: (0, 1) for eps, (1, 0) for x_0, (-sigma, alpha) for v (Salimans & Ho 2022,
    arXiv:2202.00512), (0, -1 / sigma) for the score, (-1, 1) for the flow. The target is never
    stored, and not rounded.

    Args:
        prediction: [N, ...], floating point, any memory format.
        x0: clean images, like ``prediction``; None if p is 0, which saves reading them.
        noise: like ``prediction``; None if q is 0.
        t: timesteps [N], int64, in 0..T-1.
        target_x0: p [T], float32 (float64 for a float64 prediction).
        target_noise: q [T], of the dtype of ``target_x0``.
        weight: [T], of the dtype of ``target_x0``.

    Returns:
        [N] in the tables' dtype, in which errors and their mean are computed. Differentiable in
        ``prediction``, ``x0`` and ``noise``, once.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
        IndexError: a timestep outside 0..T-1 (CPU tensors; on a GPU the loss is NaN).
    """
    tables = (target_x0, target_noise, weight)
    return dispatch(
        prediction, _kernel, reference.denoising_loss, _check, prediction, x0, noise, t, *tables
    )


def denoising_loss_from_seed(
    prediction: Tensor,
    x0: Tensor | None,
    seed: Tensor,
    row: Tensor,
    t: Tensor,
    target_x0: Tensor,
    target_noise: Tensor,
    weight: Tensor,
) -> Tensor:
    """weight_t mean((prediction - p_t x_0 - q_t noise)^2) of each image, with the noise of a seed.

    The loss is :func:`denoising_loss`. The noise is that of :func:`philox_normal` for ``seed`` and
    ``row``, not rounded, which :func:`q_sample_from_seed` also puts into x_t. Forward and backward
    each compute it anew.

    Args:
        prediction: [N, ...], floating point, channels-first or channels-last.
        x0: clean images, like ``prediction``; None if p is 0, which saves reading them.
        seed: int64 [N, 2], for each image its seed and its number.
        row: ``row`` of :func:`philox_normal`, an int64 tensor of one element on the device of
            ``prediction``; its lowest 32 bits are used.
        t: timesteps [N], int64, in 0..T-1.
        target_x0: p [T], float32 (float64 for a float64 prediction).
        target_noise: q [T], of the dtype of ``target_x0``.
        weight: [T], of the dtype of ``target_x0``.

    Returns:
        [N] in the tables' dtype. Differentiable in ``prediction`` and ``x0``, once.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
        IndexError: a timestep outside 0..T-1 (CPU tensors; on a GPU the loss is NaN).
    """
    return dispatch(
        prediction, _kernel_from_seed, reference.denoising_loss_from_seed, _check_from_seed,
        prediction, x0, seed, row, t, target_x0, target_noise, weight,
    )  # fmt: skip


def _check_all_but_noise(
    prediction: Tensor, x0: Tensor | None, t: Tensor, p: Tensor, q: Tensor, weight: Tensor
) -> None:
    """Raise unless the arguments that both operations share fit together."""
    check_floating(prediction, "prediction")
    if x0 is not None:
        check_like(x0, prediction, "x0", "prediction")
    wide = wide_dtype(prediction.dtype)
    for name, table in (("target_x0", p), ("target_noise", q), ("weight", weight)):
        if table.ndim != 1 or table.shape != p.shape:
            wanted = "[T]" if table is p else f"({p.numel()},), the shape of target_x0"
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(table.shape)}")
        if table.dtype != wide:
            raise TypeError(
                f"{name} must be {wide} for a {prediction.dtype} prediction, got {table.dtype}"
            )
        check_device(table, prediction, name, "prediction")
    check_timesteps(t, prediction, p.numel())


def _check_grad(grad: Tensor, prediction: Tensor) -> None:
    """Raise unless ``grad`` can be the gradient of the loss [N] of ``prediction``."""
    if grad.shape != prediction.shape[:1]:
        raise ValueError(
            f"grad must have shape {tuple(prediction.shape[:1])}, got {tuple(grad.shape)}"
        )
    wide = wide_dtype(prediction.dtype)
    if grad.dtype != wide:
        raise TypeError(f"grad must be {wide}, got {grad.dtype}")
    check_device(grad, prediction, "grad", "prediction")


def _check(
    prediction: Tensor, x0: Tensor | None, noise: Tensor | None, t: Tensor,
    p: Tensor, q: Tensor, weight: Tensor,
) -> None:  # fmt: skip
    _check_all_but_noise(prediction, x0, t, p, q, weight)
    if noise is not None:
        check_like(noise, prediction, "noise", "prediction")


def _check_backward(
    grad: Tensor, prediction: Tensor, x0: Tensor | None, noise: Tensor | None, t: Tensor,
    p: Tensor, q: Tensor, weight: Tensor,
) -> None:  # fmt: skip
    _check(prediction, x0, noise, t, p, q, weight)
    _check_grad(grad, prediction)


def _check_from_seed(
    prediction: Tensor, x0: Tensor | None, seed: Tensor, row: Tensor, t: Tensor,
    p: Tensor, q: Tensor, weight: Tensor,
) -> None:  # fmt: skip
    _check_all_but_noise(prediction, x0, t, p, q, weight)
    check_seed(seed, prediction)
    check_row(row, prediction)


def _check_backward_from_seed(
    grad: Tensor, prediction: Tensor, x0: Tensor | None, seed: Tensor, row: Tensor, t: Tensor,
    p: Tensor, q: Tensor, weight: Tensor,
) -> None:  # fmt: skip
    _check_from_seed(prediction, x0, seed, row, t, p, q, weight)
    _check_grad(grad, prediction)


on_gpu("denoising_loss", _check)
on_gpu("denoising_loss_backward", _check_backward, family="denoising_loss")
on_gpu("denoising_loss_from_seed", _check_from_seed, family="denoising_loss")
on_gpu("denoising_loss_from_seed_backward", _check_backward_from_seed, family="denoising_loss")


@torch.library.register_fake("fastdiff::denoising_loss")
def _fake(prediction, x0, noise, t, p, q, weight):  # type: ignore[no-untyped-def]
    check_devices(prediction, x0, noise, t, p, q, weight)
    return weight.new_empty(prediction.shape[:1])


@torch.library.register_fake("fastdiff::denoising_loss_backward")
def _fake_backward(grad, prediction, x0, noise, t, p, q, weight):  # type: ignore[no-untyped-def]
    return fake_like(prediction, grad, x0, noise, t, p, q, weight)


@torch.library.register_fake("fastdiff::denoising_loss_from_seed")
def _fake_from_seed(prediction, x0, seed, row, t, p, q, weight):  # type: ignore[no-untyped-def]
    check_devices(prediction, x0, seed, row, t, p, q, weight)
    return weight.new_empty(prediction.shape[:1])


@torch.library.register_fake("fastdiff::denoising_loss_from_seed_backward")
def _fake_backward_from_seed(  # type: ignore[no-untyped-def]
    grad, prediction, x0, seed, row, t, p, q, weight
):
    return fake_like(prediction, grad, x0, seed, row, t, p, q, weight)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    _, _, _, t, p, q, _ = ctx.saved_tensors
    dprediction = _backward_kernel(grad, *ctx.saved_tensors)
    dx0 = _of_target(p, t, dprediction) if ctx.needs_input_grad[1] else None
    dnoise = _of_target(q, t, dprediction) if ctx.needs_input_grad[2] else None
    return dprediction, dx0, dnoise, None, None, None, None


def _backward_from_seed(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    _, _, _, _, t, p, _, _ = ctx.saved_tensors
    dprediction = _backward_kernel_from_seed(grad, *ctx.saved_tensors)
    dx0 = _of_target(p, t, dprediction) if ctx.needs_input_grad[1] else None
    return dprediction, dx0, None, None, None, None, None, None


def _of_target(factor: Tensor, t: Tensor, dprediction: Tensor) -> Tensor:
    """The gradient of x0 or of the noise, whose factor in the target is ``factor``[t]."""
    shape = (-1, *[1] * (dprediction.ndim - 1))
    return (-factor[t].view(shape) * dprediction).to(dprediction.dtype)


torch.library.register_autograd("fastdiff::denoising_loss", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "fastdiff::denoising_loss_from_seed", _backward_from_seed, setup_context=_setup_context
)
refuse_to_differentiate("denoising_loss_backward")
refuse_to_differentiate("denoising_loss_from_seed_backward")
