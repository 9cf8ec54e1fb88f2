"""a += weight (p - a) for all averages a and parameters p of a model, in one launch.

Reads 2 S and writes 1 S for parameters of S bytes, the minimum. A launch for each pair would be
hundreds of launches of a few microseconds. A program finds its piece of a pair in a table on the
device, 24 bytes for each piece of 2048 elements. The arithmetic is that of torch.lerp, in float32,
rounded once. weight is read from the device, so that a captured graph uses its present value.

The table of a list of tensors is made and copied to the device once, and kept for later calls with
the same memory. Nothing can be copied while a CUDA graph is captured, so the list must have been
used before. A table that a captured graph reads is kept as long as the process lives, since the
graph reads it at every replay.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.launch import launch

PIECE = 2048  # elements of a row of the table, at most
_KEPT = 64  # how many tables that no captured graph reads are kept

# Addresses of an average and of its parameter, their shape, the strides of each.
Pair = tuple[int, int, torch.Size, tuple[int, ...], tuple[int, ...]]
Key = tuple[tuple[Pair, ...], torch.dtype, torch.dtype, torch.device]


class Table(NamedTuple):
    """Rows (address in the average, address in the parameter, elements), int64 on the device."""

    rows: Tensor
    aligned: bool  # all tensors begin at multiples of 16 bytes


_tables: OrderedDict[Key, Table] = OrderedDict()
_captured: dict[Key, Table] = {}

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _lerp(a, p, weight):
    """torch.lerp(a, p, weight), which gives a itself at 0 and p itself at 1."""
    distance = p - a
    return tl.where(weight < 0.5, a + weight * distance, p - distance * (1 - weight))


@triton.jit
def _update(average, parameter, weight, offset, mask):
    a = tl.load(average + offset, mask)
    p = tl.load(parameter + offset, mask)
    moved = _lerp(a.to(tl.float32), p.to(tl.float32), weight)
    tl.store(average + offset, moved.to(a.dtype), mask)


@triton.jit
def _ema_update(
    table, weight, AVERAGE: tl.constexpr, PARAMETER: tl.constexpr, ALIGNED: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    entry = table + 3 * tl.program_id(0)
    average = tl.load(entry).to(tl.pointer_type(AVERAGE))
    parameter = tl.load(entry + 1).to(tl.pointer_type(PARAMETER))
    count = tl.load(entry + 2).to(tl.int32)
    weight = tl.load(weight)
    if ALIGNED:
        average = tl.multiple_of(average, 16)
        parameter = tl.multiple_of(parameter, 16)
    # First all multiples of 16 elements, then the remainder at the end of a tensor.
    whole = count // 16 * 16
    offset = tl.arange(0, SIZE)
    _update(average, parameter, weight, offset, offset < whole)
    if count > whole:
        rest = whole + tl.arange(0, 16)
        _update(average, parameter, weight, rest, rest < count)


def ema_update(averages: Sequence[Tensor], parameters: Sequence[Tensor], weight: Tensor) -> None:
    """Move each average towards its parameter in place, in the order of their common memory.

    Raises:
        ValueError: an average and its parameter have different strides, or gaps in memory.
        RuntimeError: a CUDA graph is being captured and these tensors were never used before.
    """
    pairs: dict[tuple[torch.dtype, torch.dtype], list[Pair]] = {}
    for a, p in zip(averages, parameters, strict=True):
        if a.numel():
            pair = (a.data_ptr(), p.data_ptr(), a.shape, a.stride(), p.stride())
            pairs.setdefault((a.dtype, p.dtype), []).append(pair)
    for (average, parameter), members in pairs.items():
        table = _table(tuple(members), average, parameter, weight.device)
        launch(
            _ema_update,
            (table.rows.shape[0],),
            table.rows,
            weight,
            AVERAGE=_TYPES[average],
            PARAMETER=_TYPES[parameter],
            ALIGNED=table.aligned,
            SIZE=PIECE,
            num_warps=4,
        )


def _table(
    pairs: tuple[Pair, ...], average: torch.dtype, parameter: torch.dtype, device: torch.device
) -> Table:
    key = (pairs, average, parameter, device)
    if key in _captured:
        return _captured[key]
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _tables.pop(key, None)
    if table is None:
        if capturing:
            raise RuntimeError(
                "ema_update met these tensors for the first time while a CUDA graph is captured, "
                "when nothing can be copied to the device: run once before capturing"
            )
        pieces = list(_pieces(pairs, average.itemsize, parameter.itemsize))
        rows = torch.tensor(pieces, dtype=torch.int64, device="cpu").to(device)
        table = Table(rows, all((a | p) % 16 == 0 for a, p, *_ in pairs))
    if capturing:
        _captured[key] = table
        return table
    if table.rows.is_cuda:  # it may be of another stream, and dropped from the cache while in use
        table.rows.record_stream(torch.cuda.current_stream(device))
    _tables[key] = table  # the most recently used is last
    if len(_tables) > _KEPT:
        _tables.popitem(last=False)
    return table


def _pieces(pairs: Sequence[Pair], average: int, parameter: int) -> Iterator[tuple[int, int, int]]:
    """Rows of the table. ``average`` and ``parameter`` are the bytes of an element."""
    for a, p, shape, strides, others in pairs:
        if strides != others or not _without_gaps(shape, strides):
            raise ValueError(
                "an average and its parameter must have the same strides, without gaps, got "
                f"{strides} and {others} for shape {tuple(shape)}"
            )
        elements = math.prod(shape)
        for first in range(0, elements, PIECE):
            count = min(PIECE, elements - first)
            yield a + first * average, p + first * parameter, count


def _without_gaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
