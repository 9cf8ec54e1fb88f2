"""The matches of a graph put in their places."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fastdiff.compiler.choose.budget import Budget
from fastdiff.compiler.graph.edit import OURS, remove_unused
from fastdiff.compiler.graph.nodes import argument, is_number, is_weight, value
from fastdiff.compiler.match import single_head
from fastdiff.compiler.match.fused import Activation, Match, joined
from fastdiff.compiler.match.patterns import Norm, as_rows, plain_attention
from fastdiff.compiler.match.single_head import SingleHead
from fastdiff.compiler.run import calls
from fastdiff.compiler.run.packing import Combine, Watch, behind
from fastdiff.ops.conv2d_algorithms import within_limits
from fastdiff.ops.conv_spec import ConvSpec


@dataclass(eq=False)
class Emitted:
    """A fused operation in the graph, for the report."""

    call: calls.Convolution | calls.Product | calls.Attention
    what: str
    stands_for: int
    weight_size: tuple[int, ...]


class Rewriter:
    """Replaces matches by calls of the objects of ``run.calls``.

    Args:
        gm: the graph, in place.
        matches: of ``find.find``.
        frozen: nodes that must stay as they are.
        precision: ``fast`` or ``strict``.
        packed_bytes: bound of the packed weights, or None.
    """

    def __init__(
        self,
        gm: GraphModule,
        matches: list[Match],
        frozen: set[Node],
        precision: str,
        packed_bytes: int | None,
    ) -> None:
        self.frozen = frozen
        self.graph: Graph = gm.graph
        self.budget = Budget(precision, packed_bytes)
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.new: dict[Node, Node] = {}  # what now gives the value of a node of the matches
        self.statistics: dict[Activation, Node] = {}
        self.norms: dict[tuple[Node, Node, Node | None], Node] = {}
        self.weights: list[list[Node]] = []
        self.kernels: list[tuple[int, int]] = []
        self.combines: list[Combine] = []
        self.emitted: list[Emitted] = []
        self.heads: list[SingleHead] = []
        # What it makes of weights is rounded once more, and is memory that no bound is spent on.
        if precision == "fast" and packed_bytes is None:
            self.heads, matches = single_head.take(matches, frozen)
        self.of_head = {head.out.anchor: head for head in self.heads}
        self.groups, self.single = self.budget.plan(*_merged(matches, self.order))
        first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        with gm.graph.inserting_before(first):
            self.watch = gm.graph.call_function(operator.pos, ())
        self.watch.meta[OURS] = True

    def run(self) -> list[Emitted]:
        """Rewrite, and tell what was put in."""
        steps: list[tuple[int, Match | list[Match] | SingleHead]] = []
        steps += [(self.order[m.end.node], m) for m in self.single]
        steps += [(self.order[group[0].anchor], group) for group in self.groups]
        steps += [(self.order[head.attention], head) for head in self.heads]
        for _, step in sorted(steps, key=lambda pair: pair[0]):
            if isinstance(step, Match):
                self._one(step)
            elif isinstance(step, SingleHead):
                self._single_head(step)
            else:
                self._several(step)
        done = {head.attention for head in self.heads}
        for node in list(self.graph.nodes):
            if node not in self.frozen | done and plain_attention(node):
                self._attention(node)
        self._finish()
        return self.emitted

    def _value(self, node: Any) -> Any:
        return self.new.get(node, node) if isinstance(node, Node) else node

    def _call(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta[OURS] = True
        return node

    def _weight(self, parts: list[Node], kernel: tuple[int, int], combine: Combine = behind) -> int:
        self.weights.append(parts)
        self.kernels.append(kernel)
        self.combines.append(combine)
        return len(self.weights) - 1

    def _one(self, match: Match) -> None:
        found = value(match.weight)
        assert found is not None
        head = self.of_head.get(match.anchor)
        parts, combine = head.values() if head else ([match.weight], behind)
        index = self._weight(parts, match.spec.kernel, combine)
        convolution = self._convolution(match, index, match.spec)
        norm = self._coefficients(match)
        with self.graph.inserting_before(match.end.node):
            bias = self._derived_bias(index) if head else self._value(match.bias)
            emb = self._per_channel(match.emb)
            node = self._call(
                convolution, self.watch, self._value(match.x.node), self._value(match.skip),
                bias, norm, emb, self._value(match.residual), self._scale(match),
            )  # fmt: skip
            y = node
            if match.spec.statistics:
                y = self._call(operator.getitem, node, 0)
                self.statistics[match.end] = self._call(operator.getitem, node, 1)
        self._replace(match.end.node, y)
        self._tell(convolution, match, 1, tuple(found.shape))

    def _several(self, group: list[Match]) -> None:
        first = group[0]
        index = self._weight([m.weight for m in group], (1, 1))
        norm = self._coefficients(first)
        rows = first.x.form[0] == 2
        spec, sizes = joined(group), [m.spec.filters for m in group]
        call: Any = calls.Product(index, spec) if rows else self._convolution(first, index, spec)
        with self.graph.inserting_before(first.anchor):
            biases = [self._value(m.bias) for m in group if m.bias is not None]
            bias = self._call(calls.join, *biases) if biases else None
            x = self._value(first.x.node)
            if rows:
                y = self._call(call, self.watch, x, bias)
            else:
                y = self._call(call, self.watch, x, self._value(first.skip), bias, norm, None,
                               None, 1.0)  # fmt: skip
            parts = self._call(calls.split, y, sizes)
        for i, match in enumerate(group):
            with self.graph.inserting_before(match.anchor):
                self._replace(match.anchor, self._call(operator.getitem, parts, i))
        self._tell(call, first, len(group), spec.weight)

    def _single_head(self, head: SingleHead) -> None:
        """The rows, x A^T + c of them, and the attention; the output layer comes in its turn."""
        parts, combine = head.scores()
        index = self._weight(parts, (1, 1), combine)
        query, norm = head.query, head.q.norm
        product = self._convolution(query, index, query.spec)
        attention = calls.Attention(head.scale)
        with self.graph.inserting_before(head.attention):
            rows = self._value(head.q.x.node)
            if norm is not None:
                given = (self._value(argument(norm.node, name)) for name in ("weight", "bias"))
                groups, eps = argument(norm.node, "num_groups"), argument(norm.node, "eps", 1e-5)
                rows = self._call(calls.normalised_rows, rows, groups, *given, self._value(eps))
            bias = self._derived_bias(index)
            q = self._call(product, self.watch, rows, None, bias, None, None, None, 1.0)
            heads = [self._call(torch.unsqueeze, x, 1) for x in (q, rows)]
            y = self._call(attention, heads[0], heads[1], heads[1])
            self.new[head.out.x.node] = self._call(torch.squeeze, y, 1)
        what = "norm + linear" if norm is not None else "linear"
        self.emitted.append(Emitted(product, what, 3, query.spec.weight))
        self.emitted.append(Emitted(attention, "single-head attention", 1, ()))

    def _derived_bias(self, index: int) -> Node:
        return self._call(getattr, self._call(operator.getitem, self.watch, index), "bias")

    def _attention(self, node: Node) -> None:
        call = calls.Attention(argument(node, "scale"))
        q, k, v = (argument(node, name) for name in ("query", "key", "value"))
        with self.graph.inserting_before(node):
            self._replace(node, self._call(call, q, k, v))
        self.emitted.append(Emitted(call, "attention", 1, ()))

    def _convolution(self, match: Match, index: int, spec: ConvSpec) -> calls.Convolution:
        return calls.Convolution(
            index, spec, match.x.form, match.end.form,
            allowed=self.budget.allowed(self.weights[index]), measured=self.budget.measured,
        )  # fmt: skip

    def _replace(self, old: Node, new: Node) -> None:
        new.meta["example_value"] = old.meta.get("example_value")
        self.new[old] = new
        old.replace_all_uses_with(new)

    def _per_channel(self, node: Node | None) -> Node | None:
        """What broadcasts as [N, C, 1, 1], as [N, C]."""
        if node is None:
            return None
        rows = as_rows(node)
        if rows is not None:
            return self._value(rows)
        return self._call(torch.flatten, self._value(node), 1)

    def _scale(self, match: Match) -> Any:
        scale: Any = 1.0
        for factor, times in match.scale:
            if is_number(scale) and is_number(factor):
                scale = scale * factor if times else scale / factor
            else:
                scale = self._call(operator.mul if times else operator.truediv, scale, factor)
        return scale

    def _coefficients(self, match: Match) -> Node | None:
        norm = match.norm
        if norm is None:
            return None
        key = (norm.last, match.x.node, match.skip)
        if key not in self.norms:
            with self.graph.inserting_before(norm.last):
                self.norms[key] = self._norm(norm, match)
        return self.norms[key]

    def _norm(self, norm: Norm, match: Match) -> Node:
        sources = [match.x] if match.skip is None else [match.x, Activation(match.skip, 1)]
        found = [self._statistics(source) for source in sources]
        node = norm.node
        return self._call(
            calls.coefficients, found, argument(node, "num_groups"),
            *(self._value(argument(node, name)) for name in ("weight", "bias")),
            argument(node, "eps", 1e-5), self._per_channel(norm.scale),
            self._per_channel(norm.shift),
        )  # fmt: skip

    def _statistics(self, source: Activation) -> Node:
        if source not in self.statistics:
            x = self._value(source.node)
            with self.graph.inserting_after(self.watch if x.op == "placeholder" else x):
                found = self._call(calls.statistics_of, x, source.channel)
            self.statistics[source] = found
        return self.statistics[source]

    def _tell(self, call: Any, match: Match, parts: int, size: tuple[int, ...]) -> None:
        size = size if len(size) == 4 else (*size[:2], *match.spec.kernel)
        kernel = "x".join(map(str, match.spec.kernel))
        name = f"conv {kernel}" if match.kind == "conv2d" else "linear"
        before = [w for w in match.absorbed if w in ("cat", "norm", "silu", "upsample", "pad")]
        after = [w for w in match.absorbed if w not in before]
        name = f"{parts} x {name}" if parts > 1 else name
        what = [*before, name, *after, *(["statistics"] if match.spec.statistics else [])]
        self.emitted.append(Emitted(call, " + ".join(what), parts, size))

    def _finish(self) -> None:
        if not self.weights:
            self.graph.erase_node(self.watch)
        else:
            counts = [len(parts) for parts in self.weights]
            self.watch.target = Watch(counts, self.kernels, self.combines)
            with self.graph.inserting_before(self.watch):
                self.watch.args = tuple(self._early(w) for parts in self.weights for w in parts)
        remove_unused(self.graph)

    def _early(self, weight: Node) -> Node:
        if weight.op != "get_attr":
            return weight
        copy = self.graph.get_attr(str(weight.target))
        copy.meta = dict(weight.meta)
        return copy


def _merged(matches: list[Match], order: dict[Node, int]) -> tuple[list[list[Match]], list[Match]]:
    """Linear layers that read the same, in groups, and all other matches.

    A single product of a matrix's rows is not worth a call, and left out.
    """
    groups: dict[Any, list[Match]] = defaultdict(list)
    single = []
    for m in matches:
        plain = m.end.node is m.anchor and not m.spec.statistics
        if m.kind != "linear" or not plain or not (m.bias is None or is_weight(m.bias)):
            single.append(m)
            continue
        norm = m.norm and m.norm.last
        groups[m.x, m.end.form, m.skip, norm, m.spec.silu, m.bias is None].append(m)
    several = []
    for group in groups.values():
        if len(group) > 1 and within_limits(joined(group)):
            several.append(sorted(group, key=lambda m: order[m.anchor]))
        else:
            single += group
    return several, [m for m in single if m.x.form[0] > 2]
