"""One step of any fixed-grid sampler: one row of its coefficient table, applied in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.ops.checks import (
    check_device,
    check_floating,
    check_like,
    check_same_kind,
    wide_dtype,
)
from fastdiff.ops.dispatch import dispatch, fake_like

ROW = 10  # coefficients in a row: len(fastdiff.samplers.COLUMNS)

torch.library.define(
    "fastdiff::sampler_step",
    "(Tensor x, Tensor model_out, Tensor? noise, Tensor table, Tensor step) -> Tensor",
)

_kernel = torch.ops.fastdiff.sampler_step.default


def sampler_step(
    x: Tensor, model_out: Tensor, noise: Tensor | None, table: Tensor, step: Tensor
) -> Tensor:
    """Step from x_t to the sampler's next x, by row ``step`` of its table.

    The row's meaning stands in ``fastdiff.samplers.table``. Runs without gradients.

    Args:
        x: current images [N, C, ...], floating point.
        model_out: the network's output, like x, or with 2 C channels, of which the second half
            gives the variance.
        noise: standard normal noise like x, or None for a step without noise.
        table: coefficients [S, 10], float32 (float64 for float64 images), on x's device.
        step: the row, an int64 tensor of one element on x's device (so that a captured loop can
            advance it there).

    Returns:
        The next x, in x's dtype and memory format; the arithmetic is the table's.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
        IndexError: ``step`` outside the table (CPU tensors).
    """
    return dispatch(x, _kernel, reference.sampler_step, _check, x, model_out, noise, table, step)


def _check(x: Tensor, model_out: Tensor, noise: Tensor | None, table: Tensor, step: Tensor) -> None:
    check_floating(x, "x")
    check_same_kind(model_out, x, "model_out", "x")
    n, c = (*x.shape, 0, 0)[:2]
    if x.ndim < 2 or model_out.shape not in (x.shape, (n, 2 * c, *x.shape[2:])):
        raise ValueError(
            f"model_out must have the shape of x, {tuple(x.shape)}, or twice its channels, "
            f"got {tuple(model_out.shape)}"
        )
    if noise is not None:
        check_like(noise, x, "noise", "x")
    if table.ndim != 2 or table.shape[1] != ROW:
        raise ValueError(f"table must have shape [S, {ROW}], got {tuple(table.shape)}")
    wide = wide_dtype(x.dtype)
    if table.dtype != wide:
        raise TypeError(f"table must be {wide} for {x.dtype} images, got {table.dtype}")
    if step.dtype != torch.int64 or step.numel() != 1:
        raise TypeError(
            f"step must be an int64 tensor of one element, got {step.dtype} {tuple(step.shape)}"
        )
    check_device(table, x, "table", "x")
    check_device(step, x, "step", "x")


@torch.library.register_fake("fastdiff::sampler_step")
def _fake(
    x: Tensor, model_out: Tensor, noise: Tensor | None, table: Tensor, step: Tensor
) -> Tensor:
    return fake_like(x, model_out, noise, table, step)
