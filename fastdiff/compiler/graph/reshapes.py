"""Follow the channels of an activation through transpositions and reshapes.

In an *image* the channels are dimension 1, [N, C, *pixels]; in *rows* they are the last dimension,
[N, *pixels, C]. A conversion between the two that keeps the images first and the pixels in order
moves no value to another image, channel or pixel. An operation on single pixels or channels can
therefore read through it. In channels-last memory the conversion is a view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastdiff.compiler.graph.nodes import argument, equal, op, same_sizes, value

LAYOUT_OPS = frozenset({"transpose", "permute", "view", "reshape", "flatten", "unflatten"})


def step_up(node: Node, channel: int) -> tuple[Node, int] | None:
    """The input of a layout operation, and the input's channel dimension; None for other nodes.

    Args:
        node: the operation.
        channel: the channel dimension of its result.
    """
    source = node.args[0] if node.args else None
    before, after = value(source), value(node)
    if op(node) not in LAYOUT_OPS or not isinstance(source, Node):
        return None
    if before is None or after is None:
        return None
    if before.dtype != after.dtype:
        return None
    order = order_of(node, after.ndim)
    if order is not None:
        if order[0] != 0 or not _keeps_pixels(order, channel):
            return None
        return source, order[channel]
    kept = _reshaped(before.shape, after.shape, channel)
    return None if kept is None else (source, kept)


def step_down(node: Node, channel: int) -> int | None:
    """The channel dimension of the result of a layout operation; None for other nodes.

    Args:
        node: the operation.
        channel: the channel dimension of its input.
    """
    before, after = value(node.args[0] if node.args else None), value(node)
    if op(node) not in LAYOUT_OPS or before is None or after is None:
        return None
    if before.dtype != after.dtype:
        return None
    order = order_of(node, after.ndim)
    if order is not None:
        moved = order.index(channel)
        return moved if order[0] == 0 and _keeps_pixels(order, moved) else None
    return _reshaped(after.shape, before.shape, channel)


def order_of(node: Node, ndim: int) -> list[int] | None:
    """For each dimension of a permutation's result, that of its input; None for a reshape."""
    if op(node) == "transpose":
        first, second = argument(node, "dim0"), argument(node, "dim1")
        order = list(range(ndim))
        order[first], order[second] = order[second], order[first]
        return order
    if op(node) == "permute":
        dims: Any = node.kwargs.get("dims", node.args[1:])
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        return [d % ndim for d in dims]
    return None


def _keeps_pixels(order: list[int], channel: int) -> bool:
    pixels = [d for i, d in enumerate(order) if i not in (0, channel)]
    return pixels == sorted(pixels)


def _reshaped(before: torch.Size, after: torch.Size, channel: int) -> int | None:
    """The channel dimension before a reshape that only regroups pixels; None for any other."""
    if len(before) < 3 or len(after) < 3 or not equal(before[0], after[0]):
        return None
    if channel == 1 and equal(before[1], after[1]):
        return 1
    if channel == len(after) - 1 and equal(before[-1], after[-1]):
        return len(before) - 1
    return None


def pixels(shape: torch.Size, channel: int) -> list[Any]:
    """The sizes of the dimensions that are neither images nor channels."""
    return [size for d, size in enumerate(shape) if d not in (0, channel)]


def same_pixels(a: torch.Size, channel_a: int, b: torch.Size, channel_b: int) -> bool:
    """Whether two activations are known to have the same dimensions of pixels."""
    return same_sizes(pixels(a, channel_a), pixels(b, channel_b))
