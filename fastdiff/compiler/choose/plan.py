"""Plan which matches of a graph are computed together, and by which algorithms.

Planning does not change the graph. It takes seconds where algorithms must first be measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fastdiff.compiler.choose.budget import Budget
from fastdiff.compiler.graph.dtypes import parameter_of
from fastdiff.compiler.match import single_head
from fastdiff.compiler.match.fused import Match, joined
from fastdiff.compiler.match.single_head import SingleHead
from fastdiff.ops.conv2d_algorithms import within_limits


@dataclass(frozen=True, eq=False)
class Plan:
    """What replaces the matches of a graph.

    Attributes:
        single: matches that become one call each.
        groups: linear layers with the same input; each group becomes one call.
        heads: self-attentions with one head.
        budget: the algorithms that each weight may be packed for.
    """

    single: list[Match]
    groups: list[list[Match]]
    heads: list[SingleHead]
    budget: Budget


def plan(
    matches: list[Match],
    order: dict[Node, int],
    pinned: set[Node],
    precision: str,
    packed_bytes: int | None,
    measured: bool,
) -> Plan:
    """Decide how ``matches`` are computed.

    Args:
        matches: from ``match.anchors.find``.
        order: the place of each node in the graph.
        pinned: nodes that must stay as they are.
        precision: ``fast``, ``bf16`` or ``strict``.
        packed_bytes: bound of the memory that packed weights take; None for any.
        measured: choose algorithms by the clock; else by the sizes alone.
    """
    budget = Budget(precision, packed_bytes, measured)
    heads: list[SingleHead] = []
    # Merged projections round the products of weights, and the bound does not count their memory.
    if precision != "strict" and packed_bytes is None:
        heads, matches = single_head.take(matches, pinned)
    groups, single = budget.plan(*merged(matches, order))
    return Plan(single, groups, heads, budget)


def merged(
    matches: Sequence[Match], order: dict[Node, int]
) -> tuple[list[list[Match]], list[Match]]:
    """Groups of linear layers with the same input, and all other matches.

    A single linear layer of a matrix is in neither: a call of its own would save nothing.
    """
    by_input: dict[Any, list[Match]] = defaultdict(list)
    single = []
    for m in matches:
        plain = m.end.node is m.anchor and not m.spec.statistics and not m.is_scaled
        if m.kind != "linear" or not plain or not (m.bias is None or parameter_of(m.bias)):
            single.append(m)
            continue
        norm = m.norm and m.norm.last
        by_input[m.x, m.end.form, m.skip, norm, m.spec.silu, m.bias is None].append(m)
    groups = []
    for group in by_input.values():
        if len(group) > 1 and within_limits(joined(group)):
            groups.append(sorted(group, key=lambda m: order[m.anchor]))
        else:
            single += group
    return groups, [m for m in single if m.x.form[0] > 2]
