"""Self-attention with one head: two of its four projections are merged into the other two.

With rows x [L, C], q = x Wq^T + bq, k and v likewise, the scores are

    q k^T = (x A^T + c) x^T + r, A = Wk^T Wq, c = Wk^T bq,

where r is constant along each row, so that softmax does not depend on it. With
P = softmax(scale q k^T), whose rows sum to 1, the result is

    P v Wo^T + bo = (P x) B^T + b, B = Wo Wv, b = Wo bv + bo.

So x itself is the keys and the values. The products of weights are computed in float64 and rounded
once. In the scores, x A^T is rounded instead of q and k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastdiff.compiler.graph.dtypes import parameter_of
from fastdiff.compiler.graph.nodes import argument, equal, op, value
from fastdiff.compiler.graph.reshapes import LAYOUT_OPS, order_of
from fastdiff.compiler.match.fused import Activation, Match
from fastdiff.compiler.match.patterns import plain_attention

_VIEW_OPS = LAYOUT_OPS | {"unsqueeze"}


@dataclass(frozen=True)
class Scores:
    """Computes A [C, C] and c [C] from Wq [D, C], bq [D] if ``bias``, and Wk [D, C], in float32."""

    bias: bool

    def __call__(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """A and c; c is None without bq."""
        q, *bias, k = (part.detach().double() for part in parts)
        return (k.T @ q).float(), (k.T @ bias[0]).float() if self.bias else None


@dataclass(frozen=True)
class Values:
    """Computes B [K, C] and b [K] from Wo [K, D], bo [K], Wv [D, C] and bv [D], in float32.

    Attributes:
        out_bias: whether bo is among the parts.
        bias: whether bv is among the parts.
    """

    out_bias: bool
    bias: bool

    def __call__(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """B and b; b is None without bo and bv."""
        rest = [part.detach().double() for part in parts]
        out = rest.pop(0)
        both: Tensor | None = rest.pop(0) if self.out_bias else None
        v = rest.pop(0)
        if self.bias:
            moved = out @ rest.pop(0)
            both = moved if both is None else both + moved
        return (out @ v).float(), None if both is None else both.float()


@dataclass(eq=False)
class SingleHead:
    """The matches that make up one self-attention.

    Attributes:
        q: the projection to queries. Its input and norm are those of k and v too.
        k, v, out: the projections to keys and values, and the output projection.
        attention: the attention node.
        scale: factor of the scores.
    """

    q: Match
    k: Match
    v: Match
    out: Match
    attention: Node
    scale: float

    @property
    def query(self) -> Match:
        """x A^T + c as a match, whose input is the normalised rows."""
        rows = Activation(argument(self.q.anchor, "input"), 2)
        spec = replace(self.q.spec, filters=self.q.spec.channels)
        return replace(self.q, spec=spec, x=rows, norm=None, bias=None, absorbed=[])

    def scores(self) -> tuple[list[Node], Scores]:
        """The nodes of the parts of A and c, and the function that computes A and c from them."""
        bias = _parameters(self.q.bias)
        return [self.q.weight, *bias, self.k.weight], Scores(bool(bias))

    def values(self) -> tuple[list[Node], Values]:
        """The nodes of the parts of B and b, and the function that computes B and b from them."""
        both = [_parameters(m.bias) for m in (self.out, self.v)]
        parts = [self.out.weight, *both[0], self.v.weight, *both[1]]
        return parts, Values(bool(both[0]), bool(both[1]))


def _parameters(bias: Node | None) -> list[Node]:
    parameter = parameter_of(bias)
    return [] if parameter is None else [parameter]


def take(matches: list[Match], pinned: set[Node]) -> tuple[list[SingleHead], list[Match]]:
    """The self-attentions with one head, and the matches without their q, k and v.

    Args:
        matches: from ``anchors.find``, changed in place: matches stop collecting statistics that
            only q, k and v read, and each output projection gets the input channels of B.
        pinned: nodes that must stay as they are.
    """
    by_end = {m.end.node: m for m in matches}
    heads = []
    for out in matches:
        head = _head(out, by_end, pinned)
        if head is not None:
            heads.append(head)
            out.spec = replace(out.spec, channels=head.q.spec.channels)
    gone = {id(m) for head in heads for m in (head.q, head.k, head.v)}
    left = [m for m in matches if id(m) not in gone]
    normed = [m for m in left if m.norm is not None]
    wanted = {m.x for m in normed} | {Activation(m.skip, 1) for m in normed if m.skip is not None}
    if heads:
        for m in left:
            m.spec = replace(m.spec, statistics=m.spec.statistics and m.end in wanted)
    return heads, left


def _head(out: Match, by_end: dict[Node, Match], pinned: set[Node]) -> SingleHead | None:
    """The self-attention whose output projection is ``out``; None where it has none."""
    if not _is_plain_linear(out) or out.norm is not None or out.x.form != (3, 2):
        return None
    node = _through_views(out.x.node, pinned)
    if node is None or not plain_attention(node) or len(node.users) != 1:
        return None
    rows, heads = value(out.x.node), value(node)
    assert rows is not None
    assert heads is not None
    if not _is_size_one(heads.shape[1]) or not _keeps_order(out.x.node, node):
        return None
    if not (equal(rows.shape[0], heads.shape[0]) and equal(rows.shape[2], heads.shape[3])):
        return None
    projections = []
    for name in ("query", "key", "value"):
        last = argument(node, name)
        first = _through_views(last, pinned)
        m = by_end.get(first) if first is not None else None
        if m is None or not _is_projection(m) or not _is_head(last, m.anchor):
            return None
        if len(m.anchor.users) != 1:
            return None
        projections.append(m)
    q, k, v = projections
    same = all((m.x, m.norm) == (q.x, q.norm) for m in (k, v))
    if not same or len({id(m) for m in projections}) != 3 or out in projections:
        return None
    width, channels = (int(size) for size in value(q.weight).shape)  # type: ignore[union-attr]
    if min(width, v.spec.filters) < channels:
        return None  # attention over C > D channels would cost more than the projections save
    scale = argument(node, "scale")
    return SingleHead(q, k, v, out, node, width**-0.5 if scale is None else float(scale))


def _is_plain_linear(m: Match) -> bool:
    """Whether a match is a float32 linear layer of its input or of a norm of its input."""
    if m.kind != "linear" or m.dtype != torch.float32 or m.is_scaled:
        return False
    if m.skip is not None or m.spec.silu:
        return False
    bias, weight = value(m.bias), value(m.weight)
    assert weight is not None
    return m.bias is None or (
        parameter_of(m.bias) is not None
        and bias is not None
        and tuple(bias.shape) == tuple(weight.shape[:1])
    )


def _is_projection(m: Match) -> bool:
    """Whether a match computes rows [B, L, D] from rows or from a norm, with no epilogue."""
    plain = m.end.node is m.anchor and not m.spec.statistics and m.end.form == (3, 2)
    norm = m.norm
    if norm is None:
        reads = m.x.form == (3, 2)
    else:
        reads = norm.scale is None and norm.shift is None and m.x.channel == 1
    return plain and reads and _is_plain_linear(m)


def _through_views(node: Any, pinned: set[Node]) -> Node | None:
    """The node that a node is a view of; None where other nodes read a view in between."""
    here: Any = node
    while _is_view(here):
        if here in pinned or len(here.users) != 1:
            return None
        here = here.args[0]
    return here if isinstance(here, Node) and here not in pinned else None


def _is_head(node: Node, rows: Node) -> bool:
    """Whether a node is a view [B, 1, L, D] of rows [B, L, D]."""
    before, after = value(rows), value(node)
    assert before is not None
    assert after is not None
    sizes = equal(after.shape[0], before.shape[0]) and equal(after.shape[3], before.shape[2])
    return sizes and _is_size_one(after.shape[1]) and _keeps_order(node, rows)


def _is_size_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _is_view(node: Any) -> bool:
    source = value(node.args[0]) if isinstance(node, Node) and node.args else None
    if source is None or value(node) is None or source.dtype != value(node).dtype:  # type: ignore[union-attr]
        return False
    if op(node) != "getitem":
        return op(node) in _VIEW_OPS
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    sizes = list(source.shape)
    for i in index:  # may only add or remove dimensions of size 1
        if i is None:
            continue
        size = sizes.pop(0)
        if not (i == slice(None) or (type(i) is int and i == 0 and _is_size_one(size))):
            return False
    return True


def _keeps_order(node: Node, source: Node) -> bool:
    """Whether a view of ``source`` keeps the order of all dimensions whose size is not 1."""
    path = [node]
    while path[-1] is not source:
        path.append(path[-1].args[0])  # type: ignore[arg-type]
    shape = value(source).shape  # type: ignore[union-attr]
    places = list(range(len(shape)))  # for each dimension of the view, that of the source
    for view in path[-2::-1]:
        after = value(view).shape  # type: ignore[union-attr]
        order = order_of(view, len(after))
        if order is not None:
            places = [places[d] for d in order]
        else:
            long = [(place, size) for place, size in zip(places, shape, strict=True)
                    if not _is_size_one(size)]  # fmt: skip
            sizes = [size for size in after if not _is_size_one(size)]
            if len(long) != len(sizes):
                return False
            # If all sizes but one are known to be equal, the last is equal too.
            if sum(not equal(a, b) for (_, a), b in zip(long, sizes, strict=True)) > 1:
                return False
            left = iter(long)
            places = [-1 if _is_size_one(size) else next(left)[0] for size in after]
        shape = after
    kept = [place for place, size in zip(places, shape, strict=True) if not _is_size_one(size)]
    return all(a < b for a, b in pairwise(kept))
