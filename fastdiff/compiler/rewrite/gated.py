"""The gated linear units of transformer blocks, a * gelu(b), as one operation."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from fastdiff import ops
from fastdiff.compiler.graph.edit import call_ours, redirect, remove_unused
from fastdiff.compiler.graph.effects import name_of
from fastdiff.compiler.graph.nodes import argument, equal, op, value
from fastdiff.compiler.match.patterns import DTYPES


def gated(graph: Graph, pinned: set[Node]) -> None:
    """Put ``ops.geglu`` where a tensor's last dimension is halved and gated."""
    for node in list(graph.nodes):
        x = None if node in pinned or op(node) != "mul" else _gated(node, pinned)
        if x is None:
            continue
        with graph.inserting_before(node):
            redirect(node, call_ours(graph, ops.geglu, x))
    remove_unused(graph)


def _gated(node: Node, pinned: set[Node]) -> Node | None:
    """x of a node that is a * gelu(b), x = [a, b]."""
    first, second = argument(node, "input"), argument(node, "other")
    for a, gelu in ((first, second), (second, first)):
        if not _is_exact_gelu(gelu) or len(gelu.users) != 1 or gelu in pinned:
            continue
        b = gelu.args[0] if gelu.args else gelu.kwargs.get("input")
        halves = _half(a, 0), _half(b, 1)
        if halves[0] is not None and halves[0] is halves[1] and halves[0] not in pinned:
            x = halves[0].args[0]
            return x if isinstance(x, Node) and not pinned.intersection((a, b, x)) else None
    return None


def _is_exact_gelu(node: Any) -> bool:
    if not isinstance(node, Node) or name_of(node) != "gelu":
        return False
    return len(node.args) <= 1 and node.kwargs.get("approximate", "none") == "none"


def _half(node: Any, which: int) -> Node | None:
    """What halves a tensor's last dimension, of which ``node`` is the first or the second half."""
    if op(node) != "getitem" or type(node.args[1]) is not int or node.args[1] != which:
        return None
    halved, found = node.args[0], value(node)
    if not isinstance(halved, Node) or name_of(halved) not in ("chunk", "split", "tensor_split"):
        return None
    x = value(halved.args[0] if halved.args else None)
    if x is None or found is None or x.dtype not in DTYPES or x.ndim == 0:
        return None
    # Of parts along another dimension, the last one is whole.
    half = equal(2 * found.shape[-1], x.shape[-1]) and not equal(x.shape[-1], 0)
    return halved if half else None
