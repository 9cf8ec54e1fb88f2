"""One step of any fixed-grid sampler: apply one row of its coefficient table, in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.common.checks import (
    check_device,
    check_floating,
    check_like,
    check_same_kind,
    wide_dtype,
)
from fastdiff.ops import reference
from fastdiff.ops.backend import kernel_runs
from fastdiff.ops.dispatch import dispatch
from fastdiff.ops.gpu import on_gpu
from fastdiff.ops.philox_normal import check_seed
from fastdiff.ops.profiling import ranged

# The coefficients of a row, in their order; the coefficients of the history's slots follow.
# fastdiff/samplers/table.py defines each of them. Kernels know their order from
# csrc/sampler_table.h and from the constants of kernels/sampler_step.py.
COLUMNS = (
    "guidance", "rescale",
    "x0_x", "x0_m", "clip_min", "clip_max", "quantile",
    "out_x", "out_x0", "out_m", "noise", "logvar", "logvar_v",
    "keep_x", "keep_x0", "keep_m", "keep_noise", "slot",
)  # fmt: skip
MAX_HISTORY = 8  # largest number of slots

torch.library.define(
    "fastdiff::sampler_step",
    "(Tensor x, Tensor model_out, Tensor(a!)? history, Tensor? noise, Tensor table, Tensor step, "
    "Tensor? seed, Tensor(b!) out) -> ()",
)

_kernel = torch.ops.fastdiff.sampler_step.default


def sampler_step(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    *,
    seed: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Step from x_t to the sampler's next x, by row ``step`` of its table.

    ``fastdiff.samplers.table`` defines what a row does: guidance (arXiv:2207.12598), its rescaling
    (arXiv:2305.08891, section 3.4), clipping of x0 or dynamic thresholding (arXiv:2205.11487,
    section 2.3), and the linear combination of x, x0, the model's output, earlier values and noise.
    The step is not differentiable.

    Args:
        x: current images [N, C, ...], floating point.
        model_out: the network's output in x's dtype, [N, C, ...]. Of 2 N images the first N are
            unconditional and the last N conditional. Of 2 C channels the second half gives the
            variance.
        history: [K, N, C, ...] in the table's dtype, in which the row's slot is written; see
            :func:`new_history`. A slot whose coefficient is 0 is not read. None for a table without
            history (K = 0).
        noise: standard normal noise like x; None for noise from ``seed``, or for no noise if
            ``seed`` is None too.
        table: coefficients [R, 18 + K], float32 (float64 for float64 images), on x's device.
        step: the row, an int64 tensor of one element on x's device (so that a captured loop can
            advance it there).
        seed: int64 [N, 2], for each image its seed and its number. The noise is then that of
            :func:`philox_normal` with ``step`` as its row, computed within the step.
        out: a tensor like x for the result, which may be x itself; None for a new tensor.

    Returns:
        The next x: ``out``, or a new tensor of x's dtype and strides. It is computed in the table's
        dtype.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit, both noise and seed are given, or the history
            overlaps another tensor or itself.
        IndexError: ``step`` outside the table, or the row's slot outside the history (CPU tensors).
    """
    if out is None:
        out = torch.empty_like(x)
    dispatch(
        x, _kernel, reference.sampler_step, _check,
        x, model_out, history, noise, table, step, seed, out,
    )  # fmt: skip
    return out


def sampler_step_for(x: Tensor) -> Callable[..., None]:
    """The function that :func:`sampler_step` runs on tensors like ``x``, without its checks.

    Returns:
        A function of x, model_out, history, noise, table, step, seed and out, in this order, for
        the backend that is set now. It is for a loop that has checked its tensors once. A kernel
        still refuses tensors that do not fit.
    """
    return ranged("sampler_step", _kernel if kernel_runs(x) else reference.sampler_step)


def new_history(x: Tensor, depth: int) -> Tensor:
    """An empty history for images like ``x``: zeros [depth, *x.shape], float32, or float64 for it.

    Each slot has the memory format of ``x``, which is the fast path of :func:`sampler_step`.

    Raises:
        ValueError: ``depth`` outside 0..8.
    """
    if not 0 <= depth <= MAX_HISTORY:
        raise ValueError(f"depth must lie in 0..{MAX_HISTORY}, got {depth}")
    strides = (x.numel(), *torch.empty_like(x).stride())
    dtype = wide_dtype(x.dtype)
    return torch.empty_strided((depth, *x.shape), strides, dtype=dtype, device=x.device).zero_()


def _check(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    seed: Tensor | None,
    out: Tensor,
) -> None:
    check_floating(x, "x")
    check_same_kind(model_out, x, "model_out", "x")
    n, c, *rest = (*x.shape, 0, 0) if x.ndim < 2 else x.shape
    if x.ndim < 2 or (*model_out.shape,) not in [
        (images, channels, *rest) for images in (n, 2 * n) for channels in (c, 2 * c)
    ]:
        raise ValueError(
            f"model_out must have the shape of x, {tuple(x.shape)}, or twice its images, its "
            f"channels or both, got {tuple(model_out.shape)}"
        )
    wide = wide_dtype(x.dtype)
    depth = 0
    if history is not None:
        depth = history.shape[0] if history.ndim else 0
        if history.shape != (depth, *x.shape) or depth > MAX_HISTORY:
            raise ValueError(
                f"history must have shape [K, {', '.join(map(str, x.shape))}] with K <= "
                f"{MAX_HISTORY}, got {tuple(history.shape)}"
            )
        if history.dtype != wide:
            raise TypeError(f"history must be {wide} for {x.dtype} images, got {history.dtype}")
        check_device(history, x, "history", "x")
    if noise is not None:
        check_like(noise, x, "noise", "x")
    if table.ndim != 2 or table.shape[1] != len(COLUMNS) + depth:
        raise ValueError(
            f"table must have shape [R, {len(COLUMNS) + depth}] for a history of {depth}, "
            f"got {tuple(table.shape)}"
        )
    if table.dtype != wide:
        raise TypeError(f"table must be {wide} for {x.dtype} images, got {table.dtype}")
    if step.dtype != torch.int64 or step.numel() != 1:
        raise TypeError(
            f"step must be an int64 tensor of one element, got {step.dtype} {tuple(step.shape)}"
        )
    check_device(table, x, "table", "x")
    check_device(step, x, "step", "x")
    if seed is not None:
        if noise is not None:
            raise ValueError("noise and seed cannot both be given")
        check_seed(seed, x)
    check_like(out, x, "out", "x")


on_gpu("sampler_step", _check)


@torch.library.register_fake("fastdiff::sampler_step")
def _fake(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    seed: Tensor | None,
    out: Tensor,
) -> None:
    # Beside a meta tensor the dispatcher would have this answer for a kernel.
    for value in (model_out, history, noise, table, step, seed, out):
        if value is not None:
            check_device(value, x, "every tensor", "x")
