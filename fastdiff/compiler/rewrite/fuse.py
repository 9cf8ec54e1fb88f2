"""Replace the matches of a graph by calls of ``fastdiff.compiler.run.calls``, as a plan says."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fastdiff.compiler.choose.plan import Plan
from fastdiff.compiler.graph.edit import call_ours, remove_unused
from fastdiff.compiler.graph.nodes import argument, value
from fastdiff.compiler.match.fused import Activation, Match, joined
from fastdiff.compiler.match.patterns import Norm, plain_attention
from fastdiff.compiler.match.single_head import SingleHead
from fastdiff.compiler.rewrite.emitter import Emitted, Emitter
from fastdiff.compiler.rewrite.weights_node import Weight, weights_node
from fastdiff.compiler.run import calls
from fastdiff.compiler.run.adapted_weights import Combine
from fastdiff.compiler.run.computed_weights import Scaled
from fastdiff.compiler.run.packing import concatenate
from fastdiff.ops.conv2d_spec import ConvSpec


@dataclass(frozen=True, eq=False)
class Fusion:
    """What ``fuse`` put into a graph.

    Attributes:
        emitted: the fused operations.
        weights: the node that gives their packed weights; None where nothing is packed.
    """

    emitted: list[Emitted]
    weights: Node | None


def fuse(graph: Graph, plan: Plan, pinned: set[Node]) -> Fusion:
    """Replace what a plan names by calls of ``run.calls``.

    Args:
        graph: changed in place.
        plan: of its matches.
        pinned: nodes that must stay as they are.
    """
    return _Emitter(graph, plan).run(pinned)


class _Emitter(Emitter):
    """Emits the calls of one plan.

    Attributes:
        norms: for a norm and its inputs, the node that gives its coefficients.
    """

    def __init__(self, graph: Graph, plan: Plan) -> None:
        super().__init__(graph)
        self.plan = plan
        self.norms: dict[tuple[Node, Node, Node | None], Node] = {}
        self.of_head = {head.out.anchor: head for head in plan.heads}

    def run(self, pinned: set[Node]) -> Fusion:
        """Emit everything in the graph's order."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        heads, groups, single = self.plan.heads, self.plan.groups, self.plan.single
        steps: list[tuple[int, Match | list[Match] | SingleHead]] = []
        steps += [(order[m.end.node], m) for m in single]
        steps += [(order[group[0].anchor], group) for group in groups]
        steps += [(order[head.attention], head) for head in heads]
        steps.sort(key=lambda pair: pair[0])
        self.weights = [self._weight(step) for _, step in steps]
        self.packed: Node | None = weights_node(self.graph, self.weights) if self.weights else None
        for index, (_, step) in enumerate(steps):
            if isinstance(step, Match):
                self._one(step, index)
            elif isinstance(step, SingleHead):
                self._single_head(step, index)
            else:
                self._several(step, index)
        done = pinned | {head.attention for head in heads}
        for node in list(self.graph.nodes):
            if node not in done and plain_attention(node):
                self.attention(node, calls.Attention(argument(node, "scale")))
        remove_unused(self.graph)
        return Fusion(self.emitted, self.packed)

    def _weight(self, step: Match | list[Match] | SingleHead) -> Weight:
        """The weight that a step of the plan packs."""
        if isinstance(step, list):
            return Weight([m.weight for m in step], (1, 1))
        if isinstance(step, SingleHead):
            parts, combine = step.scores()
            return Weight(parts, (1, 1), combine)
        head = self.of_head.get(step.anchor)
        if head is None:
            return Weight([step.weight], step.spec.kernel, _scaled(step))
        products, values = head.values()
        return Weight(products, step.spec.kernel, values)

    def _convolved(self, convolution: calls.Convolution, x: Any, **operands: Any) -> Node:
        """A call of ``convolution`` with the operands that are not None."""
        present = {name: value for name, value in operands.items() if value is not None}
        return call_ours(self.graph, convolution, self.packed, x, **present)

    def _one(self, match: Match, index: int) -> None:
        """Emit a convolution or a linear layer with its prologue and epilogue."""
        weight = value(match.weight)
        assert weight is not None
        convolution = self._convolution(match, index, match.spec)
        norm = self._coefficients(match)
        with self.graph.inserting_before(match.end.node):
            norm = self._gains(match) if norm is None else norm
            derived = match.anchor in self.of_head
            y = node = self._convolved(
                convolution,
                self.current(match.x.node),
                skip=self.current(match.skip),
                bias=self._derived_bias(index) if derived else self.current(match.bias),
                norm=norm,
                emb=self.per_channel(match.emb),
                residual=self.current(match.residual),
                scale=self.factor(match),
            )
            if match.spec.statistics:
                y = self.call(operator.getitem, node, 0)
                self.statistics[match.end] = self.call(operator.getitem, node, 1)
        self.replace(match.end.node, y)
        self.tell(convolution, match, 1, tuple(weight.shape))

    def _several(self, group: list[Match], index: int) -> None:
        """Emit linear layers with the same input as one product."""
        first = group[0]
        norm = self._coefficients(first)
        rows = first.x.form[0] == 2
        spec, sizes = joined(group), [m.spec.filters for m in group]
        call: Any = calls.Product(index, spec) if rows else self._convolution(first, index, spec)
        with self.graph.inserting_before(first.anchor):
            biases = [self.current(m.bias) for m in group if m.bias is not None]
            bias = self.call(calls.join, *biases) if biases else None
            x = self.current(first.x.node)
            if rows:
                y = self.call(call, self.packed, x, bias)
            else:
                y = self._convolved(call, x, skip=self.current(first.skip), bias=bias, norm=norm)
            parts = self.call(calls.split, y, sizes)
        for i, match in enumerate(group):
            with self.graph.inserting_before(match.anchor):
                self.replace(match.anchor, self.call(operator.getitem, parts, i))
        self.tell(call, first, len(group), spec.weight)

    def _single_head(self, head: SingleHead, index: int) -> None:
        """Emit the rows x, x A^T + c, and the attention. The output projection is a later step."""
        query, norm = head.query, head.q.norm
        product = self._convolution(query, index, query.spec)
        attention = calls.Attention(head.scale)
        with self.graph.inserting_before(head.attention):
            rows = self.current(head.q.x.node)
            if norm is not None:
                affine = (self.current(argument(norm.node, name)) for name in ("weight", "bias"))
                groups, eps = argument(norm.node, "num_groups"), argument(norm.node, "eps", 1e-5)
                rows = self.call(calls.normalised_rows, rows, groups, *affine, self.current(eps))
            bias = self._derived_bias(index)
            q = self._convolved(product, rows, bias=bias)
            heads = [self.call(torch.unsqueeze, x, 1) for x in (q, rows)]
            y = self.call(attention, heads[0], heads[1], heads[1])
            self.replacements[head.out.x.node] = self.call(torch.squeeze, y, 1)
        what = "norm + linear" if norm is not None else "linear"
        self.emitted.append(Emitted(product, what, query.dtype, 3, query.spec.weight))
        self.emitted.append(Emitted(attention, "single-head attention", query.dtype, 1, ()))

    def _derived_bias(self, index: int) -> Node:
        return self.call(getattr, self.call(operator.getitem, self.packed, index), "bias")

    def _convolution(self, match: Match, index: int, spec: ConvSpec) -> calls.Convolution:
        return calls.Convolution(
            index, spec, match.x.form, match.end.form,
            allowed=self.plan.budget.allowed(self.weights[index].parts),
            measured=self.plan.budget.measured,
            seconds_per_byte=self.plan.budget.seconds_per_byte,
        )  # fmt: skip

    def _coefficients(self, match: Match) -> Node | None:
        norm = match.norm
        if norm is None:
            return None
        key = (norm.last, match.x.node, match.skip)
        if key not in self.norms:
            with self.graph.inserting_before(norm.last):
                self.norms[key] = self._norm(norm, match)
        return self.norms[key]

    def _gains(self, match: Match) -> Node | None:
        """The node that gives a match's gains in the form of a norm's coefficients."""
        if match.gain is not None:
            return self.call(calls.gains, self.per_channel(match.gain))
        if match.shares == (1.0, 1.0) or not match.spec.silu:
            return None
        return self.call(calls.constant_gains, _channels(match), match.shares)

    def _norm(self, norm: Norm, match: Match) -> Node:
        sources = [match.x] if match.skip is None else [match.x, Activation(match.skip, 1)]
        statistics = [self.statistics_of(source) for source in sources]
        node = norm.node
        return self.call(
            calls.coefficients, statistics, argument(node, "num_groups"),
            *(self.current(argument(node, name)) for name in ("weight", "bias")),
            argument(node, "eps", 1e-5), self.per_channel(norm.scale),
            self.per_channel(norm.shift),
        )  # fmt: skip


def _channels(match: Match) -> tuple[int, int]:
    """The channels of x and of skip."""
    skip = value(match.skip)
    count = 0 if skip is None else int(skip.shape[1])
    return match.spec.channels - count, count


def _scaled(match: Match) -> Combine:
    """What makes a match's weight of its parameter."""
    # Constants of channels are the weight's, too, unless a SiLU is between.
    shares = (1.0, 1.0) if match.spec.silu else match.shares
    factors = [match.factor * share for share in shares]
    if factors[0] != factors[1]:
        return Scaled(tuple(zip(_channels(match), factors, strict=True)))
    return concatenate if factors[0] == 1 else Scaled(((match.spec.channels, factors[0]),))
