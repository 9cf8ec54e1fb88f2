"""The forward process with noise of a counter, which is drawn on the way and not stored."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import reference
from fastdiff.ops.dispatch import differentiable, dispatch, fake_like
from fastdiff.ops.gpu import on_gpu
from fastdiff.ops.philox_normal import check_row, check_seed
from fastdiff.ops.q_sample import check_q_sample

torch.library.define(
    "fastdiff::q_sample_from_seed",
    "(Tensor x0, Tensor t, Tensor seed, Tensor row, Tensor sqrt_alphas_cumprod, "
    "Tensor sqrt_one_minus_alphas_cumprod) -> Tensor",
)

_kernel = differentiable(torch.ops.fastdiff.q_sample_from_seed.default)


def q_sample_from_seed(
    x0: Tensor,
    t: Tensor,
    seed: Tensor,
    row: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, with noise drawn on the way (DDPM, eq. 4).

    Args:
        x0: clean images [N, C, ...], floating point, channels-first or channels-last.
        t: timesteps [N], int64, in 0..T-1.
        seed: int64 [N, 2], for each image its seed and its number.
        row: which noise of that seed, an int64 tensor of one element on x0's device (so that a
            captured training step can raise it there); its lowest 32 bits count.
        sqrt_alphas_cumprod: sqrt(abar) [T], float32 (float64 for float64 images).
        sqrt_one_minus_alphas_cumprod: sqrt(1 - abar) [T], likewise.

    Returns:
        x_t like x0, rounded once. The noise in it is that of :func:`philox_normal` for ``seed`` and
        ``row`` in the tables' dtype, which draws it again. Differentiable in x0.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
        IndexError: a timestep outside the tables (CPU tensors only).
    """
    return dispatch(
        x0, _kernel, reference.q_sample_from_seed, _check,
        x0, t, seed, row, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod,
    )  # fmt: skip


def _check(x0: Tensor, t: Tensor, seed: Tensor, row: Tensor, signal: Tensor, sigma: Tensor) -> None:
    check_q_sample(x0, t, x0, signal, sigma)
    check_seed(seed, x0)
    check_row(row, x0)


on_gpu("q_sample_from_seed", _check)


@torch.library.register_fake("fastdiff::q_sample_from_seed")
def _fake(
    x0: Tensor, t: Tensor, seed: Tensor, row: Tensor, signal: Tensor, sigma: Tensor
) -> Tensor:
    return fake_like(x0, t, seed, row, signal, sigma)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, t, _, _, signal, _ = inputs
    ctx.save_for_backward(t, signal)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    t, signal = ctx.saved_tensors
    dx0 = (grad * signal[t].view(-1, *[1] * (grad.ndim - 1))).to(grad.dtype)
    return dx0, None, None, None, None, None


torch.library.register_autograd(
    "fastdiff::q_sample_from_seed", _backward, setup_context=_setup_context
)
