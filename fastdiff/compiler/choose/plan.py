"""What becomes of the matches of a graph: which are computed together, and by which algorithms.

Planning changes no graph. It may measure for seconds, where times are not known on this machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fastdiff.compiler.choose.budget import Budget
from fastdiff.compiler.graph.nodes import is_weight
from fastdiff.compiler.match import single_head
from fastdiff.compiler.match.fused import Match, joined
from fastdiff.compiler.match.single_head import SingleHead
from fastdiff.ops.conv2d_algorithms import within_limits


@dataclass(frozen=True, eq=False)
class Plan:
    """What is put in the places of a graph's matches.

    Attributes:
        single: matches that become one call each.
        groups: linear layers that read the same, of which each group becomes one call.
        heads: self-attentions with one head.
        budget: which algorithms a weight may be packed for.
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
    """Decide what becomes of ``matches``.

    Args:
        matches: of ``match.anchors.find``.
        order: the place of each node in the graph.
        pinned: nodes that must stay as they are.
        precision: ``fast`` or ``strict``.
        packed_bytes: bound of the memory that packed weights take; None for any.
        measured: choose algorithms by the clock; else by the sizes alone.
    """
    budget = Budget(precision, packed_bytes, measured)
    heads: list[SingleHead] = []
    # Products of weights are rounded once more than the weights, and their memory is in no bound.
    if precision == "fast" and packed_bytes is None:
        heads, matches = single_head.take(matches, pinned)
    groups, single = budget.plan(*_merged(matches, order))
    return Plan(single, groups, heads, budget)


def _merged(
    matches: Sequence[Match], order: dict[Node, int]
) -> tuple[list[list[Match]], list[Match]]:
    """Linear layers that read the same, in groups, and all other matches.

    A single product of a matrix's rows is not worth a call, and is in neither.
    """
    by_input: dict[Any, list[Match]] = defaultdict(list)
    single = []
    for m in matches:
        plain = m.end.node is m.anchor and not m.spec.statistics
        if m.kind != "linear" or not plain or not (m.bias is None or is_weight(m.bias)):
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
