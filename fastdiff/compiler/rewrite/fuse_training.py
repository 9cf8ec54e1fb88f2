"""Replace the matches of a graph with gradients by calls of ``run.trained``."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from fastdiff.compiler.graph.dtypes import parameter_of
from fastdiff.compiler.graph.edit import call_ours, remove_unused
from fastdiff.compiler.graph.nodes import argument, is_number, value
from fastdiff.compiler.match.fused import Activation, Match, joined
from fastdiff.compiler.match.patterns import plain_attention
from fastdiff.compiler.rewrite.emitter import Emitted, Emitter
from fastdiff.compiler.run import calls
from fastdiff.compiler.run.trained import TrainedConvolution
from fastdiff.ops.conv2d_spec import ConvSpec


def fuse_training(
    graph: Graph, groups: list[list[Match]], single: list[Match], pinned: set[Node], *, strict: bool
) -> list[Emitted]:
    """Replace matches and attentions by calls that have gradients.

    Args:
        graph: changed in place.
        groups: linear layers with the same input; each group becomes one call.
        single: matches that become one call each.
        pinned: nodes that must stay as they are.
        strict: whether convolutions compute by direct arithmetic alone.

    Returns:
        The fused operations.
    """
    return _Emitter(graph, strict).run(groups, single, pinned)


class _Emitter(Emitter):
    def __init__(self, graph: Graph, strict: bool) -> None:
        super().__init__(graph)
        self.strict = strict

    def run(
        self, groups: list[list[Match]], single: list[Match], pinned: set[Node]
    ) -> list[Emitted]:
        """Emit everything in the graph's order."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        steps: list[tuple[int, Match | list[Match]]] = []
        steps += [(order[m.end.node], m) for m in single]
        steps += [(order[group[0].anchor], group) for group in groups]
        for _, step in sorted(steps, key=lambda pair: pair[0]):
            if isinstance(step, Match):
                self._one(step)
            else:
                self._several(step)
        for node in list(self.graph.nodes):
            if node not in pinned and plain_attention(node):
                self.attention(node, calls.TrainedAttention(argument(node, "scale")))
        remove_unused(self.graph)
        return self.emitted

    def _one(self, match: Match) -> None:
        """Emit a convolution or a linear layer with its prologue and epilogue."""
        sizes = value(match.weight)
        assert sizes is not None
        call = self._convolution(match, match.spec)
        norm = self._norm(match)
        with self.graph.inserting_before(match.end.node):
            weight = match.weight
            if match.factor != 1:
                weight = self.call(operator.mul, weight, match.factor)
            y = node = self._convolved(
                call,
                self.current(match.x.node),
                weight,
                bias=_parameter(match.bias),
                skip=self.current(match.skip),
                emb=self.per_channel(match.emb),
                residual=self.current(match.residual),
                scale=self.factor(match),
                **norm,
            )
            if match.spec.statistics:
                y = self.call(operator.getitem, node, 0)
                self.statistics[match.end] = self.call(operator.getitem, node, 1)
        self.replace(match.end.node, y)
        self.tell(call, match, 1, tuple(sizes.shape))

    def _several(self, group: list[Match]) -> None:
        """Emit linear layers with the same input as one."""
        first = group[0]
        spec, sizes = joined(group), [m.spec.filters for m in group]
        call = self._convolution(first, spec)
        norm = self._norm(first)
        with self.graph.inserting_before(first.anchor):
            weight = self.call(calls.join, *(m.weight for m in group))
            biases = [_parameter(m.bias) for m in group if m.bias is not None]
            y = self._convolved(
                call,
                self.current(first.x.node),
                weight,
                bias=self.call(calls.join, *biases) if biases else None,
                skip=self.current(first.skip),
                **norm,
            )
            parts = self.call(calls.split, y, sizes)
        for i, match in enumerate(group):
            with self.graph.inserting_before(match.anchor):
                self.replace(match.anchor, self.call(operator.getitem, parts, i))
        self.tell(call, first, len(group), spec.weight)

    def _convolved(self, call: TrainedConvolution, x: Any, weight: Any, **operands: Any) -> Node:
        present = {name: value for name, value in operands.items() if value is not None}
        return call_ours(self.graph, call, x, weight, **present)

    def _convolution(self, match: Match, spec: ConvSpec) -> TrainedConvolution:
        node = match.norm and match.norm.node
        return TrainedConvolution(
            spec, match.x.form, match.end.form,
            num_groups=argument(node, "num_groups") if node else 0,
            eps=argument(node, "eps", 1e-5) if node else 0.0,
            strict=self.strict,
        )  # fmt: skip

    def _norm(self, match: Match) -> dict[str, Any]:
        """The operands of a match's norm."""
        norm = match.norm
        if norm is None:
            return {}
        sources = [match.x] if match.skip is None else [match.x, Activation(match.skip, 1)]
        with self.graph.inserting_before(norm.last):
            return {
                "gain": _parameter(argument(norm.node, "weight")),
                "offset": _parameter(argument(norm.node, "bias")),
                "norm_scale": self.per_channel(norm.scale),
                "norm_shift": self.per_channel(norm.shift),
                "statistics": [self.statistics_of(source) for source in sources],
            }


def may_train(match: Match) -> bool:
    """Whether a match is fused with gradients.

    Python must know its norm's numbers. Linear layers of matrices are those of embeddings, whose
    few rows would gain nothing.
    """
    known = match.norm is None or is_number(argument(match.norm.node, "eps", 1e-5))
    return known and match.x.form[0] > 2


def _parameter(node: Node | None) -> Node | None:
    """The parameter itself where a node converts one: its gradient is then rounded once."""
    return parameter_of(node) or node
