"""The denoising loss with noise of a counter, drawn where it is needed and never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import reference
from fastdiff.ops.denoising_loss import (
    check_denoising_loss,
    check_loss_grad,
    of_input,
    refuse_second_gradient,
)
from fastdiff.ops.dispatch import check_devices, differentiable, dispatch, fake_like
from fastdiff.ops.gpu import on_gpu
from fastdiff.ops.philox_normal import check_row, check_seed

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

_kernel = differentiable(torch.ops.fastdiff.denoising_loss_from_seed.default)
_backward_kernel = differentiable(torch.ops.fastdiff.denoising_loss_from_seed_backward.default)


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

    As :func:`denoising_loss`; the noise is that of :func:`philox_normal` for ``seed`` and ``row``,
    not rounded, as :func:`q_sample_from_seed` put it into x_t. Forward and backward each draw it.

    Args:
        prediction: [N, ...], floating point, channels-first or channels-last.
        x0: clean images, like ``prediction``; None where p is 0 and they need not be read.
        seed: int64 [N, 2], for each image its seed and its number.
        row: which noise of that seed, an int64 tensor of one element on the device of
            ``prediction``; its lowest 32 bits count.
        t: timesteps [N], int64, in 0..T-1.
        target_x0: p [T], float32 (float64 for a float64 prediction).
        target_noise: q [T], likewise.
        weight: [T], likewise.

    Returns:
        [N] in the tables' dtype. Differentiable in ``prediction`` and ``x0``, once.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
        IndexError: a timestep outside 0..T-1 (CPU tensors; on a GPU the loss is NaN).
    """
    return dispatch(
        prediction, _kernel, reference.denoising_loss_from_seed, _check,
        prediction, x0, seed, row, t, target_x0, target_noise, weight,
    )  # fmt: skip


def _check(
    prediction: Tensor, x0: Tensor | None, seed: Tensor, row: Tensor, t: Tensor,
    p: Tensor, q: Tensor, weight: Tensor,
) -> None:  # fmt: skip
    check_denoising_loss(prediction, x0, t, p, q, weight)
    check_seed(seed, prediction)
    check_row(row, prediction)


def _check_backward(
    grad: Tensor, prediction: Tensor, x0: Tensor | None, seed: Tensor, row: Tensor, t: Tensor,
    p: Tensor, q: Tensor, weight: Tensor,
) -> None:  # fmt: skip
    _check(prediction, x0, seed, row, t, p, q, weight)
    check_loss_grad(grad, prediction)


on_gpu("denoising_loss_from_seed", _check)
on_gpu("denoising_loss_from_seed_backward", _check_backward)


@torch.library.register_fake("fastdiff::denoising_loss_from_seed")
def _fake(prediction, x0, seed, row, t, p, q, weight):  # type: ignore[no-untyped-def]
    check_devices(prediction, x0, seed, row, t, p, q, weight)
    return weight.new_empty(prediction.shape[:1])


@torch.library.register_fake("fastdiff::denoising_loss_from_seed_backward")
def _fake_backward(  # type: ignore[no-untyped-def]
    grad, prediction, x0, seed, row, t, p, q, weight
):
    return fake_like(prediction, grad, x0, seed, row, t, p, q, weight)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    _, _, _, _, t, p, _, _ = ctx.saved_tensors
    dprediction = _backward_kernel(grad, *ctx.saved_tensors)
    dx0 = of_input(p, t, dprediction) if ctx.needs_input_grad[1] else None
    return dprediction, dx0, None, None, None, None, None, None


torch.library.register_autograd(
    "fastdiff::denoising_loss_from_seed", _backward, setup_context=_setup_context
)
torch.library.register_autograd(
    "fastdiff::denoising_loss_from_seed_backward", refuse_second_gradient
)
