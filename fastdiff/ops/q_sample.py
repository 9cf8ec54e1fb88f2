"""x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise: one draw of the forward process."""

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
from fastdiff.ops.dispatch import differentiable, dispatch, fake_like
from fastdiff.ops.gpu import on_gpu

torch.library.define(
    "fastdiff::q_sample",
    "(Tensor x0, Tensor t, Tensor noise, Tensor sqrt_alphas_cumprod, "
    "Tensor sqrt_one_minus_alphas_cumprod) -> Tensor",
)

_kernel = differentiable(torch.ops.fastdiff.q_sample.default)


def q_sample(
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
) -> Tensor:
    """Noise images to their timesteps (Ho et al. 2020, arXiv:2006.11239, eq. 4).

    Args:
        x0: clean images [N, ...], floating point, any memory format.
        t: timesteps [N], int64, in 0..T-1.
        noise: like x0.
        sqrt_alphas_cumprod: sqrt(abar) [T], float32 (float64 for float64 images).
        sqrt_one_minus_alphas_cumprod: sqrt(1 - abar) [T], likewise.

    Returns:
        x_t in x0's dtype and memory format; products and sum are taken in the tables' dtype.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
        IndexError: a timestep outside 0..T-1 (CPU tensors).
    """
    tables = (sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod)
    return dispatch(x0, _kernel, reference.q_sample, check_q_sample, x0, t, noise, *tables)


def check_q_sample(x0: Tensor, t: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> None:
    """Raise unless these are arguments of :func:`q_sample`."""
    check_floating(x0, "x0")
    check_like(noise, x0, "noise", "x0")
    wide = wide_dtype(x0.dtype)
    for name, table in (
        ("sqrt_alphas_cumprod", signal),
        ("sqrt_one_minus_alphas_cumprod", sigma),
    ):
        if table.ndim != 1 or table.shape != signal.shape:
            raise ValueError(f"{name} must have shape [T], got {tuple(table.shape)}")
        if table.dtype != wide:
            raise TypeError(f"{name} must be {wide} for {x0.dtype} images, got {table.dtype}")
        check_device(table, x0, name, "x0")
    check_timesteps(t, x0, signal.numel())


on_gpu("q_sample", check_q_sample)


@torch.library.register_fake("fastdiff::q_sample")
def _fake(x0: Tensor, t: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    return fake_like(x0, t, noise, signal, sigma)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, t, _, signal, sigma = inputs
    ctx.save_for_backward(t, signal, sigma)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    t, signal, sigma = ctx.saved_tensors
    shape = (-1, *[1] * (grad.ndim - 1))
    dx0 = dnoise = None
    if ctx.needs_input_grad[0]:
        dx0 = (grad * signal[t].view(shape)).to(grad.dtype)
    if ctx.needs_input_grad[2]:
        dnoise = (grad * sigma[t].view(shape)).to(grad.dtype)
    return dx0, None, dnoise, None, None


torch.library.register_autograd("fastdiff::q_sample", _backward, setup_context=_setup_context)
