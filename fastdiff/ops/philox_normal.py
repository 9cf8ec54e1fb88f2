"""Normal noise that depends only on a seed, an image's number, a row and the element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.common.checks import check_device, check_floating
from fastdiff.ops import reference
from fastdiff.ops.dispatch import dispatch
from fastdiff.ops.gpu import on_gpu

torch.library.define("fastdiff::philox_normal", "(Tensor seed, int row, Tensor(a!) out) -> ()")

_kernel = torch.ops.fastdiff.philox_normal.default


def philox_normal(
    seed: Tensor, row: int, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise from the counter-based generator Philox4x32-10.

    The generator is that of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    Element e of an image (its contiguous index in [C, ...]) is word e % 4 of the counter
    (low word of e // 4, high word of e // 4, low word of the image's number, row) under the key
    (low word, high word of the seed). A word w is u = (w >> 8) / 2^24; two of them are two normal
    values, sqrt(-2 ln(1 - u_0)) times the cosine and the sine of 2 pi u_1 (Box and Muller 1958).
    So an image's noise is the same in any batch, on any device (to rounding) and in any order.

    Args:
        seed: int64 [N, 2], for each image its seed and its number.
        row: the step that the noise is for, 0..2^32-1; the noise that sampling starts from has
            2^32-1.
        shape: [N, C, ...].
        dtype: floating point; computed in float32 (float64 for float64) and rounded once.

    Returns:
        Noise of that shape, contiguous, on the device of ``seed``. ``ops.sampler_step`` with the
        same seed computes the same noise at step ``row``.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes do not fit, or ``row`` is out of its range.
    """
    out = torch.empty(tuple(shape), dtype=dtype, device=seed.device)
    dispatch(out, _kernel, reference.philox_normal, _check, seed, row, out)
    return out


def check_seed(seed: Tensor, x: Tensor) -> None:
    """ValueError or TypeError unless ``seed`` is int64 [N, 2] on the device of x [N, ...]."""
    if x.ndim < 1 or seed.shape != (x.shape[0], 2):
        wanted = f"({x.shape[0]}, 2)" if x.ndim else "[N, 2]"
        raise ValueError(
            f"seed must have shape {wanted}, the seed and the number of each image, "
            f"got {tuple(seed.shape)}"
        )
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64, got {seed.dtype}")
    check_device(seed, x, "seed", "the images")


def check_row(row: Tensor, x: Tensor) -> None:
    """TypeError or ValueError unless ``row`` is an int64 tensor of one element on x's device."""
    if row.dtype != torch.int64 or row.numel() != 1:
        raise TypeError(
            f"row must be an int64 tensor of one element, got {row.dtype} {tuple(row.shape)}"
        )
    check_device(row, x, "row", "the images")


def _check(seed: Tensor, row: int, out: Tensor) -> None:
    check_floating(out, "dtype")
    check_seed(seed, out)
    if not 0 <= row < 2**32:
        raise ValueError(f"row must lie in 0..2^32-1, got {row}")


on_gpu("philox_normal", _check)


@torch.library.register_fake("fastdiff::philox_normal")
def _fake(seed: Tensor, row: int, out: Tensor) -> None:
    check_device(seed, out, "seed", "out")
