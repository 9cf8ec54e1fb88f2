"""The node that gives a fused graph its packed weights: the first call of the graph.

Every fused operation reads its packed weight at an index of the list that this node returns, and so
does every node that reads a parameter in another dtype than the parameter's own.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from fastdiff.compiler.graph.dtypes import parameter_of
from fastdiff.compiler.graph.edit import call_ours, replace
from fastdiff.compiler.graph.nodes import dtype_of
from fastdiff.compiler.run.adapted_weights import Adapted, Combine, OfAdapted
from fastdiff.compiler.run.computed_weights import Computed
from fastdiff.compiler.run.packing import Converted, Watch, concatenate

CONVERTED = "fastdiff_converted"  # the key in ``Node.meta`` that marks converted parameters


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that a graph packs.

    Attributes:
        parts: the nodes of the parameters that it is made of.
        kernel: its height and width; None for a parameter that keeps its shape.
        combine: the function that makes it of its parts; by default they are concatenated.
    """

    parts: list[Node]
    kernel: tuple[int, int] | None
    combine: Combine = concatenate


def weights_node(graph: Graph, weights: Sequence[Weight]) -> Node:
    """Insert the node that packs ``weights``, before all other calls."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        node = call_ours(graph, Watch())
    for weight in weights:
        _add(node, weight)
    return node


def convert_once(graph: Graph, node: Node | None) -> Node | None:
    """Compute weights made of parameters, and conversions of these, once and not at every call.

    Args:
        graph: changed in place.
        node: that of ``weights_node``, which takes them up; None where there is none yet.

    Returns:
        The node that gives weights and converted parameters; None if there are neither.
    """
    # The last first: a conversion of a computed weight before that weight itself.
    for computed in reversed(list(graph.nodes)):
        parameter, dtype = parameter_of(computed), dtype_of(computed)
        if parameter is None or dtype is None or computed.op in ("placeholder", "get_attr"):
            continue
        if not computed.users:  # a computed weight that is packed
            graph.erase_node(computed)
            continue
        node = weights_node(graph, []) if node is None else node
        index = _add(node, Weight([parameter], None, Converted(dtype)))
        with graph.inserting_before(computed):
            held = call_ours(graph, operator.getitem, node, index)
            converted = graph.call_function(getattr, (held, "weight"))
        converted.meta[CONVERTED] = True
        replace(computed, converted)
    return node


def is_converted_parameter(node: Any) -> bool:
    """Whether a node reads what ``convert_once`` has inserted."""
    return isinstance(node, Node) and bool(node.meta.get(CONVERTED))


def _add(node: Node, weight: Weight) -> int:
    """Let a node of ``weights_node`` pack one more weight; its index in the node's list."""
    assert isinstance(node.target, Watch)
    made = (Adapted, Computed)
    adapters = [part.target if isinstance(part.target, made) else None for part in weight.parts]
    parts, combine = weight.parts, weight.combine
    if any(adapters):
        sources = (
            part.args if adapter else (part,) for part, adapter in zip(parts, adapters, strict=True)
        )
        parts = [source for group in sources for source in group]  # type: ignore[misc]
        combine = OfAdapted(combine, tuple(adapters))
    with node.graph.inserting_before(node):
        node.args = (*node.args, *(_early(node.graph, part) for part in parts))
    return node.target.add(len(parts), weight.kernel, combine)


def mark_droppable(node: Node) -> None:
    """Let the weights be freed once they are packed that the graph reads for nothing else."""
    assert isinstance(node.target, Watch)
    names = [_name(part) for part in node.args]  # type: ignore[arg-type]
    reads = Counter(names)
    reads.update(_name(n) for n in node.graph.nodes if set(n.users) - {node})
    for number in node.target.numbers:
        reads[names[number]] = 1
    node.target.droppable = frozenset(
        i for i, parts in enumerate(node.target.slices) if all(reads[n] == 1 for n in names[parts])
    )


def _name(node: Node) -> str:
    """Name of a parameter; nodes of one attribute have the same."""
    return str(node.target) if node.op == "get_attr" else node.name


def _early(graph: Graph, weight: Node) -> Node:
    """A node of the weight before the first call: an attribute's get_attr node may come later."""
    if weight.op != "get_attr":
        return weight
    copy = graph.get_attr(str(weight.target))
    copy.meta = dict(weight.meta)
    return copy
