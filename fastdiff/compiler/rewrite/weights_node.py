"""The node that gives a fused graph its packed weights: the first call of the graph.

Every fused operation reads its packed weight at an index of the list that this node returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from fastdiff.compiler.graph.edit import call_ours
from fastdiff.compiler.run.packing import Combine, Watch, concatenate


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that a graph packs.

    Attributes:
        parts: the nodes of the parameters that it is made of.
        kernel: its height and width.
        combine: the function that makes it of its parts; by default they are concatenated.
    """

    parts: list[Node]
    kernel: tuple[int, int]
    combine: Combine = concatenate


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
    """A node of the weight before the first call: an attribute's get_attr node may come later."""
    if weight.op != "get_attr":
        return weight
    copy = graph.get_attr(str(weight.target))
    copy.meta = dict(weight.meta)
    return copy
