"""Weights that a graph computes from parameters alone, such as normalised ones, as weights.

    w / (w.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-4) * (gain / 24)

Without gradients they are computed once, when they are packed, and again when a parameter changes
(``run.computed_weights``). With gradients they are computed at each call, before all else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from fastdiff.compiler.graph.dtypes import is_layer, parameter_of
from fastdiff.compiler.graph.edit import call_ours, redirect, remove_unused
from fastdiff.compiler.graph.effects import is_known, is_random, written
from fastdiff.compiler.graph.nodes import argument, conversion, is_weight, value
from fastdiff.compiler.run.computed_weights import Computed, Step, Value


def once(graph: Graph, pinned: set[Node]) -> None:
    """Let computed weights be nodes that count as parameters, for a graph without gradients.

    Args:
        graph: in canonical form; changed in place.
        pinned: nodes that must stay as they are.
    """
    for weight in _weights(graph, pinned):
        parts, target = _computation(weight)
        try:
            hash(target)  # equal computations share one packed weight
        except TypeError:
            continue
        with graph.inserting_before(weight):
            computed = call_ours(graph, target, *parts)
        computed.meta |= {"example_value": value(weight), "fastdiff_parameter": True}
        redirect(weight, computed)
    remove_unused(graph)


def at_each_call(graph: Graph, pinned: set[Node]) -> None:
    """Let computed weights count as parameters, and come first, in a graph with gradients."""
    weights = _weights(graph, pinned)
    needed = {node for weight in weights for node in _chain(weight)}
    order = [node for node in graph.nodes if node.op != "placeholder"]
    for node in order:
        if node in needed and node is not order[0]:
            order[0].prepend(node)
    for weight in weights:
        weight.meta["fastdiff_parameter"] = True


def _weights(graph: Graph, pinned: set[Node]) -> list[Node]:
    """The weights of layers that are computed from parameters alone."""
    derived: set[Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if not inputs or node.op not in ("call_function", "call_method") or node in pinned:
            continue
        fits = is_known(node) and not written(node) and not is_random(node)
        if fits and _is_fixed(node) and all(x in derived or is_weight(x) for x in inputs):
            derived.add(node)
    found = []
    for node in graph.nodes:
        if not is_layer(node):
            continue
        weight: Any = argument(node, "weight")
        if parameter_of(weight) is not None:
            continue
        # A weight that is converted last is packed from what it is before.
        while weight in derived and conversion(weight) is not None:
            weight = weight.args[0]
        if weight in derived and weight not in found:
            found.append(weight)
    return found


def _is_fixed(node: Node) -> bool:
    """Whether a node's value is one or several tensors of known sizes."""
    example = node.meta.get("example_value")
    tensors = example if isinstance(example, (tuple, list)) else (example,)
    return all(
        isinstance(x, Tensor) and all(isinstance(size, int) for size in x.shape) for x in tensors
    )


def _chain(weight: Node) -> list[Node]:
    """The nodes that compute a weight, without placeholders, in the order of the graph."""
    found, waiting = {weight}, [weight]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found and source.op != "placeholder":
                found.add(source)
                waiting.append(source)
    return [node for node in weight.graph.nodes if node in found]


def _computation(weight: Node) -> tuple[list[Node], Computed]:
    """The parameters that a weight is computed from, the largest first, and the computation."""
    chain = [node for node in _chain(weight) if node.op != "get_attr"]
    parts = list(
        dict.fromkeys(x for node in chain for x in node.all_input_nodes if x not in set(chain))
    )
    parts.sort(key=lambda part: -value(part).numel())  # type: ignore[union-attr]
    places = {node: Value(i) for i, node in enumerate([*parts, *chain])}

    def plain(x: Any) -> Any:
        if isinstance(x, Node):
            return places[x]
        return tuple(map(plain, x)) if isinstance(x, (tuple, list)) else x

    steps = (
        Step(
            node.target if node.op == "call_function" else str(node.target),
            plain(node.args),
            tuple((name, plain(x)) for name, x in node.kwargs.items()),
        )
        for node in chain
    )
    return parts, Computed(len(parts), tuple(steps))
