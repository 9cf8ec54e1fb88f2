"""The weighted squared error of a prediction against p x_0 + q noise, which is never stored."""

from __future__ import annotations

from typing import NoReturn

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
from fastdiff.ops.dispatch import check_devices, differentiable, dispatch, fake_like
from fastdiff.ops.gpu import on_gpu

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

_kernel = differentiable(torch.ops.fastdiff.denoising_loss.default)
_backward_kernel = differentiable(torch.ops.fastdiff.denoising_loss_backward.default)


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
        x0: clean images, like ``prediction``; None where p is 0 and they need not be read.
        noise: like ``prediction``; None where q is 0.
        t: timesteps [N], int64, in 0..T-1.
        target_x0: p [T], float32 (float64 for a float64 prediction).
        target_noise: q [T], likewise.
        weight: [T], likewise.

    Returns:
        [N] in the tables' dtype, which errors and their mean are taken in. Differentiable in
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


def check_denoising_loss(
    prediction: Tensor, x0: Tensor | None, t: Tensor, p: Tensor, q: Tensor, weight: Tensor
) -> None:
    """Raise unless these are arguments of :func:`denoising_loss`."""
    check_floating(prediction, "prediction")
    if x0 is not None:
        check_like(x0, prediction, "x0", "prediction")
    wide = wide_dtype(prediction.dtype)
    for name, table in (("target_x0", p), ("target_noise", q), ("weight", weight)):
        if table.ndim != 1 or table.shape != p.shape:
            wanted = "[T]" if table is p else f"({p.numel()},), that of target_x0"
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(table.shape)}")
        if table.dtype != wide:
            raise TypeError(
                f"{name} must be {wide} for a {prediction.dtype} prediction, got {table.dtype}"
            )
        check_device(table, prediction, name, "prediction")
    check_timesteps(t, prediction, p.numel())


def check_loss_grad(grad: Tensor, prediction: Tensor) -> None:
    """Raise unless ``grad`` is the gradient of a loss [N] of ``prediction``."""
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
    check_denoising_loss(prediction, x0, t, p, q, weight)
    if noise is not None:
        check_like(noise, prediction, "noise", "prediction")


def _check_backward(
    grad: Tensor, prediction: Tensor, x0: Tensor | None, noise: Tensor | None, t: Tensor,
    p: Tensor, q: Tensor, weight: Tensor,
) -> None:  # fmt: skip
    _check(prediction, x0, noise, t, p, q, weight)
    check_loss_grad(grad, prediction)


on_gpu("denoising_loss", _check)
on_gpu("denoising_loss_backward", _check_backward)


@torch.library.register_fake("fastdiff::denoising_loss")
def _fake(prediction, x0, noise, t, p, q, weight):  # type: ignore[no-untyped-def]
    check_devices(prediction, x0, noise, t, p, q, weight)
    return weight.new_empty(prediction.shape[:1])


@torch.library.register_fake("fastdiff::denoising_loss_backward")
def _fake_backward(grad, prediction, x0, noise, t, p, q, weight):  # type: ignore[no-untyped-def]
    return fake_like(prediction, grad, x0, noise, t, p, q, weight)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    _, _, _, t, p, q, _ = ctx.saved_tensors
    dprediction = _backward_kernel(grad, *ctx.saved_tensors)
    dx0 = of_input(p, t, dprediction) if ctx.needs_input_grad[1] else None
    dnoise = of_input(q, t, dprediction) if ctx.needs_input_grad[2] else None
    return dprediction, dx0, dnoise, None, None, None, None


def of_input(factor: Tensor, t: Tensor, dprediction: Tensor) -> Tensor:
    """The gradient of what the target has ``factor`` of."""
    shape = (-1, *[1] * (dprediction.ndim - 1))
    return (-factor[t].view(shape) * dprediction).to(dprediction.dtype)


def refuse_second_gradient(ctx, *grads: Tensor) -> NoReturn:  # type: ignore[no-untyped-def]
    """A backward kernel has no derivative; without this PyTorch would take it for constant."""
    raise NotImplementedError(
        "the denoising loss can be differentiated once; for a second time use "
        'fastdiff.backend("reference")'
    )


torch.library.register_autograd("fastdiff::denoising_loss", _backward, setup_context=_setup_context)
torch.library.register_autograd("fastdiff::denoising_loss_backward", refuse_second_gradient)
