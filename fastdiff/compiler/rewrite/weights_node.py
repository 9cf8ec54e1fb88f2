"""The node that gives a fused graph its packed weights: the first call of the graph.

Every call that packs a weight reads it at its index in the list that this node gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from fastdiff.compiler.graph.edit import call_ours
from fastdiff.compiler.run.packing import Combine, Watch, behind


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that a graph packs.

    Attributes:
        parts: the graph's weights that it is made of.
        kernel: its height and width.
        combine: what makes it of its parts; by default they are put one behind the other.
    """

    parts: list[Node]
    kernel: tuple[int, int]
    combine: Combine = behind


def weights_node(graph: Graph, weights: Sequence[Weight]) -> Node:
    """Insert the node that packs ``weights``, before all other calls."""
    watch = Watch(
        [len(weight.parts) for weight in weights],
        [weight.kernel for weight in weights],
        [weight.combine for weight in weights],
    )
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        parts = [_early(graph, part) for weight in weights for part in weight.parts]
        return call_ours(graph, watch, *parts)


def _early(graph: Graph, weight: Node) -> Node:
    """The weight where the first call can read it: an attribute's own node may come later."""
    if weight.op != "get_attr":
        return weight
    copy = graph.get_attr(str(weight.target))
    copy.meta = dict(weight.meta)
    return copy
