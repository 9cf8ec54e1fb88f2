"""What single nodes, and norms with their scale and shift, compute."""

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
from fastdiff.compiler.graph.reshapes import VIEWS

DTYPES = (torch.float32, torch.bfloat16)
_READ_THROUGH = VIEWS | {"silu", "group_norm", "interpolate", "pad", "contiguous", "clone", "to"}


@dataclass(frozen=True)
class Norm:
    """A group norm with ADM's scale and shift: ``last`` is the node that gives its result."""

    last: Node
    node: Node
    scale: Node | None = None
    shift: Node | None = None


def is_transparent(node: Node) -> bool:
    """Whether a node gives the values that it is given, whatever it does to their layout."""
    if op(node) == "contiguous":
        return True
    return op(node) == "clone" and value(node) is not None


def is_cast(node: Node) -> bool:
    """A conversion to or from float32 alone."""
    return conversion(node) in DTYPES and dtype_of(node.args[0]) in DTYPES


def zero_padding(node: Node) -> tuple[int, int, int, int] | None:
    """Zeros above, below, left and right of an image's pixels."""
    sides, found = argument(node, "pad"), value(node)
    if argument(node, "mode", "constant") != "constant" or found is None or found.ndim != 4:
        return None
    if argument(node, "value", None) not in (None, 0, 0.0) or not isinstance(sides, (tuple, list)):
        return None
    if len(sides) not in (2, 4) or not all(isinstance(v, int) and v >= 0 for v in sides):
        return None
    left, right, top, bottom = (*sides, 0, 0)[:4]
    return top, bottom, left, right


def doubles(node: Node) -> bool:
    """Whether an interpolation repeats each pixel twice in both directions."""
    before, after = value(argument(node, "input")), value(node)
    if argument(node, "mode", "nearest") not in ("nearest", "nearest-exact"):
        return False
    if before is None or after is None or before.ndim != 4:
        return False
    factor = argument(node, "scale_factor")
    given = factor if isinstance(factor, (tuple, list)) else [2 if factor is None else factor]
    if not all(is_number(v) and v == 2 for v in given):
        return False
    return all(equal(after.shape[d], 2 * before.shape[d]) for d in (2, 3))


def pair_of(node: Node) -> tuple[Node, Node] | None:
    """The two images that a node puts one behind the other along the channels."""
    if op(node) != "cat":
        return None
    tensors, dim, found = argument(node, "tensors"), argument(node, "dim", 0), value(node)
    if not isinstance(tensors, (tuple, list)) or len(tensors) != 2 or found is None:
        return None
    if not isinstance(dim, int) or dim % found.ndim != 1 or found.ndim != 4:
        return None
    if any(dtype_of(t) != found.dtype or value(t).ndim != 4 for t in tensors):  # type: ignore[union-attr]
        return None
    return tensors[0], tensors[1]


class Readers:
    """Which nodes are read by nothing but prologues, so that nobody else needs their values."""

    def __init__(self, anchors: set[Node]) -> None:
        self.anchors = anchors
        self.known: dict[Node, bool] = {}

    def only_prologues(self, node: Node) -> bool:
        """Whether all that comes of a node's value goes into anchors."""
        if node not in self.known:
            self.known[node] = all(self._reads(user, node) for user in node.users)
        return self.known[node]

    def _reads(self, user: Node, node: Node) -> bool:
        if user in self.anchors:
            return argument(user, "input") is node
        kind = op(user)
        if kind in ("add", "mul"):
            found = per_channel(user)
            fits = found is not None and found[0] is node
        else:
            fits = kind in _READ_THROUGH
        return fits and self.only_prologues(user)


def norm_of(node: Node, readers: Readers) -> Norm | None:
    """A group norm that ``node`` is the result of, with or without a scale and a shift."""
    scale = shift = None
    here: Any = node
    if op(here) == "add":
        found = per_channel(here)
        if found is None:
            return None
        here, shift = found
    if op(here) == "mul" and (here is node or readers.only_prologues(here)):
        found = per_channel(here)
        if found is None:
            return None
        here, factor = found
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
    """s of a node that is 1 + s."""
    if op(factor) != "add":
        return None
    a, b = argument(factor, "input"), argument(factor, "other")
    for one, s in ((a, b), (b, a)):
        if is_number(one) and one == 1 and isinstance(s, Node):
            return s
    return None


def per_channel(node: Node) -> tuple[Node, Node] | None:
    """The image and the value per channel that an addition or multiplication has as operands."""
    a, b, found = argument(node, "input"), argument(node, "other"), value(node)
    if found is None:
        return None
    for x, v in ((a, b), (b, a)):
        y = value(x)
        if is_per_channel(v, found) and y is not None and same_sizes(y.shape, found.shape):
            return x, v
    return None


def is_per_channel(v: Any, like: torch.Tensor | None) -> bool:
    """Whether a node broadcasts a number for each image (or for all) and channel to ``like``."""
    found = value(v)
    if found is None or like is None or found.ndim != like.ndim or like.ndim < 3:
        return False
    if found.dtype not in DTYPES or not equal(found.shape[1], like.shape[1]):
        return False
    if not all(isinstance(size, int) and size == 1 for size in found.shape[2:]):
        return False
    images = found.shape[0]
    return equal(images, like.shape[0]) or (isinstance(images, int) and images == 1)


def scale_of(node: Node, mine: Node) -> tuple[Any, bool] | None:
    """The number that a node multiplies (True) or divides (False) by."""
    a, b = argument(node, "input"), argument(node, "other")
    times = op(node) == "mul"
    for x, s in ((a, b), (b, a)) if times else ((a, b),):
        if x is mine and ((is_number(s) and (times or s != 0)) or is_scalar_node(s)):
            return s, times
    return None


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
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return False
    alike = same_sizes(q.shape[:2], k.shape[:2]) and same_sizes(k.shape[:3], v.shape[:3])
    return alike and equal(q.shape[3], k.shape[3])


def as_rows(node: Node) -> Node | None:
    """[N, C] that a node [N, C, 1, ...] is a view of; None where only a view of it will do."""
    here: Any = node
    while True:
        found = value(here)
        if found is None:
            return None
        if found.ndim == 2:
            return here
        source = here.args[0] if here.args else None
        before = value(source)
        if before is None or before.ndim < 2 or before.dtype != found.dtype:
            return None
        if op(here) == "getitem":
            index = here.args[1]
            if not isinstance(index, tuple) or any(i not in (None, slice(None)) for i in index):
                return None
        elif op(here) not in ("unsqueeze", "view", "reshape"):
            return None
        if not same_sizes(before.shape[:2], found.shape[:2]):
            return None
        here = source
