"""x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise: a sample of the forward process.

``q_sample`` takes the noise as a tensor. ``q_sample_from_seed`` computes the noise from a seed as
it computes x_t, so the noise is never in memory.
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
from fastdiff.ops.dispatch import differentiable, dispatch, fake_like
from fastdiff.ops.gpu import on_gpu
from fastdiff.ops.philox_normal import check_row, check_seed

torch.library.define(
    "fastdiff::q_sample",
    "(Tensor x0, Tensor t, Tensor noise, Tensor sqrt_alphas_cumprod, "
    "Tensor sqrt_one_minus_alphas_cumprod) -> Tensor",
)
torch.library.define(
    "fastdiff::q_sample_from_seed",
    "(Tensor x0, Tensor t, Tensor seed, Tensor row, Tensor sqrt_alphas_cumprod, "
    "Tensor sqrt_one_minus_alphas_cumprod) -> Tensor",
)

_kernel = differentiable(torch.ops.fastdiff.q_sample.default)
_kernel_from_seed = differentiable(torch.ops.fastdiff.q_sample_from_seed.default)


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
        sqrt_one_minus_alphas_cumprod: sqrt(1 - abar) [T], of the same dtype.

    Returns:
        x_t in x0's dtype and memory format; products and sum are computed in the tables' dtype.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
        IndexError: a timestep outside 0..T-1 (CPU tensors).
    """
    tables = (sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod)
    return dispatch(x0, _kernel, reference.q_sample, _check, x0, t, noise, *tables)


def q_sample_from_seed(
    x0: Tensor,
    t: Tensor,
    seed: Tensor,
    row: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
) -> Tensor:
    """Noise images to their timesteps with the noise of a seed (DDPM, eq. 4).

    Args:
        x0: clean images [N, C, ...], floating point, channels-first or channels-last.
        t: timesteps [N], int64, in 0..T-1.
        seed: int64 [N, 2], for each image its seed and its number.
        row: ``row`` of :func:`philox_normal`, an int64 tensor of one element on x0's device (so
            that a captured training step can increment it there); its lowest 32 bits are used.
        sqrt_alphas_cumprod: sqrt(abar) [T], float32 (float64 for float64 images).
        sqrt_one_minus_alphas_cumprod: sqrt(1 - abar) [T], of the same dtype.

    Returns:
        x_t like x0, rounded once. Its noise is the result of :func:`philox_normal` for ``seed`` and
        ``row`` in the tables' dtype. Differentiable in x0.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
        IndexError: a timestep outside the tables (CPU tensors only).
    """
    return dispatch(
        x0, _kernel_from_seed, reference.q_sample_from_seed, _check_from_seed,
        x0, t, seed, row, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod,
    )  # fmt: skip


def _check(x0: Tensor, t: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> None:
    check_floating(x0, "x0")
    check_like(noise, x0, "noise", "x0")
    _check_tables(x0, t, signal, sigma)


def _check_from_seed(
    x0: Tensor, t: Tensor, seed: Tensor, row: Tensor, signal: Tensor, sigma: Tensor
) -> None:
    check_floating(x0, "x0")
    _check_tables(x0, t, signal, sigma)
    check_seed(seed, x0)
    check_row(row, x0)


def _check_tables(x0: Tensor, t: Tensor, signal: Tensor, sigma: Tensor) -> None:
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


on_gpu("q_sample", _check)
on_gpu("q_sample_from_seed", _check_from_seed, family="q_sample")


@torch.library.register_fake("fastdiff::q_sample")
def _fake(x0: Tensor, t: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    return fake_like(x0, t, noise, signal, sigma)


@torch.library.register_fake("fastdiff::q_sample_from_seed")
def _fake_from_seed(
    x0: Tensor, t: Tensor, seed: Tensor, row: Tensor, signal: Tensor, sigma: Tensor
) -> Tensor:
    return fake_like(x0, t, seed, row, signal, sigma)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, t, _, signal, sigma = inputs
    ctx.save_for_backward(t, signal, sigma)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    t, signal, sigma = ctx.saved_tensors
    dx0 = _scaled(grad, signal, t) if ctx.needs_input_grad[0] else None
    dnoise = _scaled(grad, sigma, t) if ctx.needs_input_grad[2] else None
    return dx0, None, dnoise, None, None


def _setup_context_from_seed(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, t, _, _, signal, _ = inputs
    ctx.save_for_backward(t, signal)


def _backward_from_seed(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    t, signal = ctx.saved_tensors
    return _scaled(grad, signal, t), None, None, None, None, None


def _scaled(grad: Tensor, factor: Tensor, t: Tensor) -> Tensor:
    """``grad`` times the entry of the table ``factor`` at each image's timestep."""
    return (grad * factor[t].view(-1, *[1] * (grad.ndim - 1))).to(grad.dtype)


torch.library.register_autograd("fastdiff::q_sample", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "fastdiff::q_sample_from_seed", _backward_from_seed, setup_context=_setup_context_from_seed
)
