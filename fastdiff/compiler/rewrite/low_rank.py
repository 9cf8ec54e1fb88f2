"""Add LoRA's products of low rank to the weights that they adapt, before these are packed.

    y = linear(x, W, b) + s * linear(linear(x, A), B)   ->   y = linear(x, W + s B A, b)

and the same for convolutions, where A has the window of W and B has a window of 1x1 (Hu et al.,
"LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3). The sum of the weights is
computed once, and again when one of them or s changes. So an adapted layer takes the time of a
plain one, and is fused, and joined with others, like a plain one. Several adapters of a layer are
added one after the other.

s is a number, or an input of the graph that holds one, or a product or quotient of such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from fastdiff.compiler.graph.dtypes import is_layer, parameter_of
from fastdiff.compiler.graph.edit import call_ours, convert_to, remove_unused, replace
from fastdiff.compiler.graph.nodes import argument, dtype_of, is_number, op, pair, value
from fastdiff.compiler.run.adapted_weights import Adapted, Scale


def fold(graph: Graph, pinned: set[Node]) -> None:
    """Replace layers with adapters by layers with adapted weights.

    Args:
        graph: in canonical form; changed in place. Each adapted weight is a node that computes it
            from parameters, and counts as a parameter (``graph.nodes.is_weight``).
        pinned: nodes that must stay as they are.
    """
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if op(node) != "add" or node in pinned:
            continue
        a, b = argument(node, "input"), argument(node, "other")
        for layer, product in ((a, b), (b, a)):
            adapter = _adapter(layer, product, pinned)
            if adapter is not None and dtype_of(node) == dtype_of(layer):
                with graph.inserting_before(first):
                    _adapt(layer, adapter)
                replace(node, layer)
                break
    remove_unused(graph)


@dataclass(frozen=True)
class _Number:
    """A product: a constant, times nodes [()] that hold numbers, over others."""

    constant: float = 1.0
    above: tuple[Node, ...] = ()
    below: tuple[Node, ...] = ()

    def times(self, other: _Number) -> _Number:
        return _Number(
            self.constant * other.constant, self.above + other.above, self.below + other.below
        )

    def over(self, other: _Number) -> _Number | None:
        if other.constant == 0:
            return None
        return self.times(_Number(1 / other.constant, other.below, other.above))


def _number(node: Any) -> _Number | None:
    """What a number of the graph is made of; None where it is none, or is computed otherwise."""
    if is_number(node):
        return _Number(float(node))
    if not isinstance(node, Node):
        return None
    if node.op == "call_method" and node.target == "item":
        return _number(node.args[0])
    if node.op == "placeholder":
        held = value(node)
        fits = held is not None and held.ndim == 0 and held.dtype.is_floating_point
        return _Number(above=(node,)) if fits else None
    if op(node) not in ("mul", "div"):
        return None
    a, b = _number(argument(node, "input")), _number(argument(node, "other"))
    if a is None or b is None:
        return None
    return a.times(b) if op(node) == "mul" else a.over(b)


@dataclass(frozen=True)
class _Adapter:
    """The nodes of A and B, and the scale."""

    a: Node
    b: Node
    scale: _Number


def _adapter(layer: Any, product: Any, pinned: set[Node]) -> _Adapter | None:
    """The adapter, where ``product`` is LoRA's for ``layer``; None for other nodes."""
    if not _is_adaptable(layer, pinned) or not isinstance(product, Node):
        return None
    scaled = _scaled(product, pinned)
    if scaled is None:
        return None
    up, scale = scaled
    down = argument(up, "input")
    if not _is_adaptable(up, pinned) or not _is_adaptable(down, pinned) or down is layer:
        return None
    if argument(up, "bias") is not None or argument(down, "bias") is not None:
        return None
    fits = op(layer) == op(up) == op(down) and argument(down, "input") is argument(layer, "input")
    if not fits or not (_has_window_of(down, layer) and _has_no_window(up)):
        return None
    if len({dtype_of(node) for node in (layer, down, up, product)}) != 1:
        return None
    return _Adapter(argument(down, "weight"), argument(up, "weight"), scale)


def _scaled(product: Node, pinned: set[Node]) -> tuple[Node, _Number] | None:
    """The layer that ``product`` is a multiple of, and the factor; None for other nodes."""
    scale, here = _Number(), product
    while op(here) in ("mul", "div"):
        if not _is_private(here, pinned):
            return None
        a, b = argument(here, "input"), argument(here, "other")
        if op(here) == "mul" and _number(a) is not None:
            a, b = b, a
        factor = _number(b)
        if factor is None or not isinstance(a, Node):
            return None
        longer = scale.times(factor) if op(here) == "mul" else scale.over(factor)
        if longer is None:
            return None
        scale, here = longer, a
    return (here, scale) if is_layer(here) else None


def _is_adaptable(node: Any, pinned: set[Node]) -> bool:
    """Whether a node is a layer whose weight is a parameter, and which one other node reads."""
    if not isinstance(node, Node) or op(node) not in ("linear", "conv2d"):
        return False
    weight = parameter_of(argument(node, "weight"))
    if weight is None or weight.op == "get_attr":  # which may stand behind the first call
        return False
    groups = 1 if op(node) == "linear" else argument(node, "groups", 1)
    return _is_private(node, pinned) and groups == 1


def _is_private(node: Node, pinned: set[Node]) -> bool:
    return node not in pinned and len(node.users) == 1


def _has_window_of(down: Node, layer: Node) -> bool:
    """Whether two layers read the same pixels for each result."""
    if op(layer) == "linear":
        return True
    mine, other = value(argument(down, "weight")), value(argument(layer, "weight"))
    assert mine is not None
    assert other is not None
    return tuple(mine.shape[1:]) == tuple(other.shape[1:]) and all(
        _whole(down, name, default) == _whole(layer, name, default)
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )


def _has_no_window(up: Node) -> bool:
    """Whether a layer reads one pixel for each result."""
    weight = value(argument(up, "weight"))
    assert weight is not None
    if op(up) == "linear":
        return True
    return (
        tuple(weight.shape[2:]) == (1, 1)
        and _whole(up, "stride", 1) == (1, 1)
        and _whole(up, "padding", 0) in ((0, 0), "valid", "same")
    )


def _whole(node: Node, name: str, default: int) -> Any:
    """An argument of a convolution as a pair, or a word as it is."""
    given = argument(node, name, default)
    return given if isinstance(given, str) else pair(given)


def _adapt(layer: Node, adapter: _Adapter) -> None:
    """Let a layer read its weight with an adapter."""
    read, scale = argument(layer, "weight"), adapter.scale
    weight, factors = parameter_of(read), [parameter_of(adapter.a), parameter_of(adapter.b)]
    assert weight is not None
    before = weight.target if isinstance(weight.target, Adapted) else Adapted(())
    held = weight.args if isinstance(weight.target, Adapted) else (weight,)
    divides = (*(False for _ in scale.above), *(True for _ in scale.below))
    target = Adapted((*before.scales, Scale(scale.constant, divides)))
    adapted = call_ours(layer.graph, target, *held, *factors, *scale.above, *scale.below)
    adapted.meta |= {"example_value": value(weight), "fastdiff_parameter": True}
    dtype = dtype_of(read)
    if dtype_of(adapted) != dtype:
        assert dtype is not None
        adapted = convert_to(layer.graph, adapted, dtype)
    layer.replace_input_with(read, adapted)
