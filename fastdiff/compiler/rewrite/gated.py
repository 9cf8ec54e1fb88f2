"""Replace the gated linear units of transformer blocks, a * gelu(b), by ``ops.geglu``."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from fastdiff import ops
from fastdiff.compiler.graph.edit import call_ours, redirect, remove_unused
from fastdiff.compiler.graph.effects import name_of
from fastdiff.compiler.graph.nodes import argument, equal, op, value
from fastdiff.compiler.match.patterns import FUSED_DTYPES


def gated(graph: Graph, pinned: set[Node]) -> None:
    """Replace a * gelu(b) of the halves a, b of a tensor's last dimension by ``ops.geglu``."""
    for node in list(graph.nodes):
        x = None if node in pinned or op(node) != "mul" else _gated(node, pinned)
        if x is None:
            continue
        with graph.inserting_before(node):
            redirect(node, call_ours(graph, ops.geglu, x))
    remove_unused(graph)


def _gated(node: Node, pinned: set[Node]) -> Node | None:
    """x, if a node is a * gelu(b) with x = [a, b]; else None."""
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
    """The node of which ``node`` is half ``which`` (0 or 1) of the last dimension; else None."""
    if op(node) != "getitem" or type(node.args[1]) is not int or node.args[1] != which:
        return None
    halved, result = node.args[0], value(node)
    if not isinstance(halved, Node) or name_of(halved) not in ("chunk", "split", "tensor_split"):
        return None
    x = value(halved.args[0] if halved.args else None)
    if x is None or result is None or x.dtype not in FUSED_DTYPES or x.ndim == 0:
        return None
    # If another dimension was divided, the last dimension still has its full size.
    half = equal(2 * result.shape[-1], x.shape[-1]) and not equal(x.shape[-1], 0)
    return halved if half else None
