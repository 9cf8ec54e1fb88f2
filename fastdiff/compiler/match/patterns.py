"""Patterns of single nodes, of norms with scale and shift, and of plain attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fastdiff.compiler.graph.nodes import (
    argument,
    conversion,
    dtype_of,
    equal,
    is_number,
    is_scalar_node,
    op,
    same_sizes,
    value,
)
from fastdiff.compiler.graph.reshapes import LAYOUT_OPS

FUSED_DTYPES = (torch.float32, torch.bfloat16)
_PROLOGUE_OPS = LAYOUT_OPS | {
    "silu", "group_norm", "interpolate", "pad", "contiguous", "clone", "to",
}  # fmt: skip
# Operations with a result that the epilogue of a convolution may multiply by a constant.
_EPILOGUE_OPS = frozenset({"conv1d", "conv2d", "linear", "add", "lerp", "mul", "div"})


@dataclass(frozen=True)
class Norm:
    """A group norm with ADM's scale and shift.

    Attributes:
        last: the node that gives the result: the norm, or its scale, or its shift.
        node: the group_norm node.
        scale: s, where the normalised values are multiplied by 1 + s.
        shift: what is added after that.
    """

    last: Node
    node: Node
    scale: Node | None = None
    shift: Node | None = None


def is_transparent(node: Node) -> bool:
    """Whether a node returns the values of its input, possibly in another memory layout."""
    if op(node) == "contiguous":
        return True
    return op(node) == "clone" and value(node) is not None


def is_cast(node: Node) -> bool:
    """Whether a node only converts between float32 and bfloat16."""
    return conversion(node) in FUSED_DTYPES and dtype_of(node.args[0]) in FUSED_DTYPES


def zero_padding(node: Node) -> tuple[int, int, int, int] | None:
    """Zeros that a pad adds above, below, left and right of an image; None for other padding."""
    sides, result = argument(node, "pad"), value(node)
    if argument(node, "mode", "constant") != "constant" or result is None:
        return None
    if result.ndim != 4:
        return None
    if argument(node, "value", None) not in (None, 0, 0.0) or not isinstance(sides, (tuple, list)):
        return None
    if len(sides) not in (2, 4) or not all(isinstance(v, int) and v >= 0 for v in sides):
        return None
    left, right, top, bottom = (*sides, 0, 0)[:4]
    return top, bottom, left, right


def repeats(node: Node) -> tuple[int, int] | None:
    """How often an interpolation repeats each row and column, (2, 2) or (1, 2); None for others."""
    before, after = value(argument(node, "input")), value(node)
    if argument(node, "mode", "nearest") not in ("nearest", "nearest-exact"):
        return None
    if before is None or after is None or before.ndim != 4:
        return None
    for rows in (2, 1):
        times = rows, 2
        factor = argument(node, "scale_factor")
        factors = factor if isinstance(factor, (tuple, list)) else [factor] * 2
        if factor is not None and not (all(map(is_number, factors)) and tuple(factors) == times):
            continue
        if all(equal(after.shape[d + 2], times[d] * before.shape[d + 2]) for d in (0, 1)):
            return times
    return None


def pair_of(node: Node) -> tuple[Node, Node] | None:
    """The two images that a node concatenates along the channels; None for other nodes."""
    if op(node) != "cat":
        return None
    tensors, dim, result = argument(node, "tensors"), argument(node, "dim", 0), value(node)
    if not isinstance(tensors, (tuple, list)) or len(tensors) != 2 or result is None:
        return None
    if not isinstance(dim, int) or dim % result.ndim != 1 or result.ndim != 4:
        return None
    if any(dtype_of(t) != result.dtype or value(t).ndim != 4 for t in tensors):  # type: ignore[union-attr]
        return None
    return tensors[0], tensors[1]


class Readers:
    """Finds nodes that are read by prologues alone: no other node needs their values.

    Args:
        anchors: the anchors of all matches.
    """

    def __init__(self, anchors: set[Node]) -> None:
        self.anchors = anchors
        self.known: dict[Node, bool] = {}

    def only_prologues(self, node: Node) -> bool:
        """Whether a node's value reaches anchors alone, through operations of a prologue."""
        if node not in self.known:
            self.known[node] = all(self._reads(user, node) for user in node.users)
        return self.known[node]

    def _reads(self, user: Node, node: Node) -> bool:
        if user in self.anchors:
            return argument(user, "input") is node
        kind = op(user)
        if kind in ("add", "mul", "div"):
            operands = per_channel(user) if kind != "div" else None
            fits = (operands is not None and operands[0] is node) or constant_of(user) is not None
        else:
            fits = kind in _PROLOGUE_OPS
        return fits and self.only_prologues(user)


def norm_of(node: Node, readers: Readers) -> Norm | None:
    """The group norm, with or without scale and shift, whose result is ``node``."""
    scale = shift = None
    here: Any = node
    if op(here) == "add":
        operands = per_channel(here)
        if operands is None:
            return None
        here, shift = operands
    if op(here) == "mul" and (here is node or readers.only_prologues(here)):
        operands = per_channel(here)
        if operands is None:
            return None
        here, factor = operands
        scale = one_plus(factor)
        if scale is None:
            return None
    if here is not node and not readers.only_prologues(here):
        return None
    while isinstance(here, Node) and here is not node and is_cast(here):
        here = here.args[0]
    if op(here) != "group_norm" or not isinstance(argument(here, "num_groups"), int):
        return None
    eps = argument(here, "eps", 1e-5)
    if not is_number(eps) and not is_scalar_node(eps):
        return None
    return Norm(node, here, scale, shift)


def one_plus(factor: Node) -> Node | None:
    """s, where a node is 1 + s; None for other nodes."""
    if op(factor) != "add":
        return None
    a, b = argument(factor, "input"), argument(factor, "other")
    for one, s in ((a, b), (b, a)):
        if is_number(one) and one == 1 and isinstance(s, Node):
            return s
    return None


def per_channel(node: Node) -> tuple[Node, Node] | None:
    """The image and the value per channel that a node adds or multiplies; None for other nodes."""
    a, b, result = argument(node, "input"), argument(node, "other"), value(node)
    if result is None:
        return None
    for x, v in ((a, b), (b, a)):
        y = value(x)
        if is_per_channel(v, result) and y is not None and same_sizes(y.shape, result.shape):
            return x, v
    return None


def is_per_channel(v: Any, like: torch.Tensor | None) -> bool:
    """Whether a node is [N or 1, C, 1, ...], which broadcasts to ``like`` [N, C, *pixels]."""
    y = value(v)
    if y is None or like is None or y.ndim != like.ndim or like.ndim < 3:
        return False
    if y.dtype not in FUSED_DTYPES or not equal(y.shape[1], like.shape[1]):
        return False
    if not all(isinstance(size, int) and size == 1 for size in y.shape[2:]):
        return False
    images = y.shape[0]
    return equal(images, like.shape[0]) or (isinstance(images, int) and images == 1)


def scale_of(node: Node, mine: Node) -> tuple[Any, bool] | None:
    """The number that a node multiplies (True) or divides (False) ``mine`` by; else None."""
    a, b = argument(node, "input"), argument(node, "other")
    times = op(node) == "mul"
    for x, s in ((a, b), (b, a)) if times else ((a, b),):
        if x is mine and ((is_number(s) and (times or s != 0)) or is_scalar_node(s)):
            return s, times
    return None


def constant_of(node: Node) -> tuple[Node, float] | None:
    """What a node multiplies by a constant, and the constant; None for other nodes."""
    if op(node) not in ("mul", "div"):
        return None
    for name in ("input", "other"):
        x = argument(node, name)
        if isinstance(x, Node) and dtype_of(x) == dtype_of(node) is not None:
            scale = scale_of(node, x)
            if scale is not None and is_number(scale[0]) and scale[0] != 0:
                return x, float(scale[0]) if scale[1] else 1 / scale[0]
    return None


def multiple_of(node: Node) -> tuple[Node, float] | None:
    """What a node multiplies by a constant, and the constant, if no epilogue would take that."""
    found = constant_of(node)
    if found is None or (len(found[0].users) == 1 and op(found[0]) in _EPILOGUE_OPS):
        return None
    return found


def weighted_sum(node: Node, mine: Node) -> tuple[float, Node, float] | None:
    """The weight of ``mine``, another node and its weight, where a node is their sum so weighted.

    Such are torch.lerp with a number, which is neither 0 nor 1, and sums, whose other addend may be
    a constant multiple that nothing else reads.
    """
    if op(node) == "lerp":
        a, b, weight = (argument(node, name) for name in ("input", "end", "weight"))
        if not is_number(weight) or weight in (0, 1) or a is b or mine not in (a, b):
            return None
        return (weight, a, 1 - weight) if mine is b else (1 - weight, b, weight)
    if op(node) != "add":
        return None
    a, b = argument(node, "input"), argument(node, "other")
    other = b if a is mine else a
    if not isinstance(other, Node) or other is mine:
        return None
    multiple = multiple_of(other) if len(other.users) == 1 else None
    return (1.0, other, 1.0) if multiple is None or multiple[0] is mine else (1.0, *multiple)


def plain_attention(node: Node) -> bool:
    """Whether a node is softmax attention of four dimensions without a mask."""
    if op(node) != "attention" or argument(node, "attn_mask") is not None:
        return False
    flags = [argument(node, name, False) for name in ("is_causal", "enable_gqa")]
    dropout, scale = argument(node, "dropout_p", 0.0), argument(node, "scale")
    if any(flags) or dropout != 0 or not (scale is None or is_number(scale)):
        return False
    q, k, v = (value(argument(node, name)) for name in ("query", "key", "value"))
    if q is None or k is None or v is None or not q.ndim == k.ndim == v.ndim == 4:
        return False
    if q.dtype not in FUSED_DTYPES or not q.dtype == k.dtype == v.dtype:
        return False
    alike = same_sizes(q.shape[:2], k.shape[:2]) and same_sizes(k.shape[:3], v.shape[:3])
    return alike and equal(q.shape[3], k.shape[3])


def as_rows(node: Node) -> Node | None:
    """The node [N, C] that a node [N, C, 1, ...] is a view of; None where there is no such node."""
    here: Any = node
    while True:
        view = value(here)
        if view is None:
            return None
        if view.ndim == 2:
            return here
        source = here.args[0] if here.args else None
        before = value(source)
        if before is None or before.ndim < 2 or before.dtype != view.dtype:
            return None
        if op(here) == "getitem":
            index = here.args[1]
            if not isinstance(index, tuple) or any(i not in (None, slice(None)) for i in index):
                return None
        elif op(here) not in ("unsqueeze", "view", "reshape"):
            return None
        if not same_sizes(before.shape[:2], view.shape[:2]):
            return None
        here = source
