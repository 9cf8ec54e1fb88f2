"""What puts fused operations in the place of a graph's matches, with and without gradients."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fastdiff.compiler.graph.edit import call_ours, redirect
from fastdiff.compiler.graph.nodes import argument, dtype_of, is_number
from fastdiff.compiler.match.fused import Activation, Match
from fastdiff.compiler.match.patterns import as_rows
from fastdiff.compiler.run import calls
from fastdiff.compiler.run.trained import TrainedConvolution

_BEFORE = ("cat", "norm", "gain", "silu", "upsample", "pad")  # names of a prologue's operations


@dataclass(eq=False)
class Emitted:
    """A fused operation in the graph, for the report.

    Attributes:
        call: what its node calls.
        what: names of the operations that it computes.
        dtype: of its inputs and its result.
        stands_for: how many convolutions, linear layers or attentions it replaces.
        weight_size: sizes [K, C, R, S] of its weight; empty without a weight.
    """

    call: calls.Convolution | calls.Product | calls.Attention | TrainedConvolution
    what: str
    dtype: torch.dtype
    stands_for: int
    weight_size: tuple[int, ...]


class Emitter:
    """Emits calls into a graph.

    Attributes:
        graph: changed in place.
        first: the graph's first call.
        replacements: for a replaced node, the node that now gives its value.
        statistics: for an activation that a norm reads, the node that gives its statistics.
        emitted: the calls so far.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.first = next(node for node in graph.nodes if node.op != "placeholder")
        self.replacements: dict[Node, Node] = {}
        self.statistics: dict[Activation, Node] = {}
        self.emitted: list[Emitted] = []

    def current(self, node: Any) -> Any:
        """The node that now gives the value of ``node``; anything but nodes as it is."""
        return self.replacements.get(node, node) if isinstance(node, Node) else node

    def call(self, target: Any, *args: Any) -> Node:
        """A new node that calls ``target``."""
        return call_ours(self.graph, target, *args)

    def replace(self, old: Node, new: Node) -> None:
        """Let the readers of ``old`` read ``new``."""
        self.replacements[old] = new
        redirect(old, new)

    def per_channel(self, node: Node | None) -> Node | None:
        """A node [N, C] for a node [N, C, 1, ...]."""
        if node is None:
            return None
        rows = as_rows(node)
        if rows is not None:
            return self.current(rows)
        return self.call(torch.flatten, self.current(node), 1)

    def factor(self, match: Match) -> Any:
        """The number, or the node of a number, that a match multiplies its sum by."""
        scale: Any = 1.0
        for factor, times in match.scale:
            if is_number(scale) and is_number(factor):
                scale = scale * factor if times else scale / factor
            else:
                scale = self.call(operator.mul if times else operator.truediv, scale, factor)
        return scale

    def statistics_of(self, source: Activation) -> Node:
        """The node that gives the statistics of an activation's channels."""
        if source not in self.statistics:
            x = self.current(source.node)
            graph, inserted = self.graph, x.op == "placeholder"
            with graph.inserting_before(self.first) if inserted else graph.inserting_after(x):
                self.statistics[source] = self.call(calls.statistics_of, x, source.channel)
        return self.statistics[source]

    def attention(self, node: Node, call: calls.Attention) -> None:
        """Replace an attention without a mask by ``call``."""
        q, k, v = (argument(node, name) for name in ("query", "key", "value"))
        with self.graph.inserting_before(node):
            self.replace(node, self.call(call, q, k, v))
        dtype = dtype_of(q)
        assert dtype is not None
        self.emitted.append(Emitted(call, "attention", dtype, 1, ()))

    def tell(self, call: Any, match: Match, parts: int, size: tuple[int, ...]) -> None:
        """Note a call for the report: it stands for ``parts`` layers with weights of ``size``."""
        size = size if len(size) == 4 else (*size[:2], *match.spec.kernel)
        kernel = "x".join(map(str, match.spec.kernel))
        name = f"conv {kernel}" if match.kind == "conv2d" else "linear"
        before = [w for w in match.absorbed if w in _BEFORE]
        after = [w for w in match.absorbed if w not in before]
        name = f"{parts} x {name}" if parts > 1 else name
        what = [*before, name, *after, *(["statistics"] if match.spec.statistics else [])]
        self.emitted.append(Emitted(call, " + ".join(what), match.dtype, parts, size))
