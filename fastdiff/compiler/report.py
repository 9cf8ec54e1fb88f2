"""The report of one compiled graph: what was fused, what was left, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from fastdiff.compiler.graph.edit import OURS
from fastdiff.compiler.graph.effects import name_of, written
from fastdiff.compiler.graph.nodes import argument, dtype_of, is_weight, op, value
from fastdiff.compiler.reasons import Reason
from fastdiff.compiler.rewrite.emitter import Emitted
from fastdiff.compiler.rewrite.weights_node import is_converted_parameter


@dataclass
class GraphReport:
    """The report of one graph.

    Attributes:
        gradients: whether the graph is one with gradients.
        reason: why the graph is not on the fast path; None if it is.
        emitted: its fused operations.
        composed: how many other operations of ``fastdiff.ops`` were inserted.
        left: count of all other nodes, by (operation, reason).
    """

    gradients: bool = False
    reason: Reason | None = None
    emitted: list[Emitted] = field(default_factory=list)
    composed: int = 0
    left: Counter[tuple[str, str]] = field(default_factory=Counter)

    def leave(self, graph: Graph, pinned: set[Node] | None = None) -> None:
        """Count the nodes that are not fused."""
        for node in graph.nodes:
            ours = node.meta.get(OURS) or is_converted_parameter(node)
            if node.op in ("call_function", "call_method", "call_module") and not ours:
                name = str(name_of(node) or getattr(node.target, "__name__", node.target))
                self.left[name, _why(node, pinned or set(), self.reason is None)] += 1


def _why(node: Node, pinned: set[Node], fast: bool) -> str:
    if not fast:
        return "not the fast path"
    if getattr(node.target, "__name__", "") == "restore":
        return "strides as without fastdiff"
    if node in pinned or written(node):
        return "reads or writes memory that is written in place"
    kind = op(node)
    if kind not in ("conv2d", "conv1d", "linear", "group_norm"):
        return "runs as it is"
    if kind == "group_norm":
        return "its result is read by more than convolutions"
    weight, x = argument(node, "weight"), argument(node, "input")
    if not is_weight(weight) and not is_converted_parameter(weight):
        return "its weight is computed"
    if dtype_of(weight) != dtype_of(x):
        return "dtypes differ"
    if dtype_of(node) not in (torch.float32, torch.bfloat16):
        return f"dtype {dtype_of(node)}"
    example = value(x)
    if kind == "linear":
        matrix = example is not None and example.ndim == 2
        return "a single product of few rows" if matrix else "shape"
    if argument(node, "groups", 1) != 1:
        return "grouped"
    return "dilated, or of a shape that is not fused"
