"""The canonical form of a graph, which the matchers read.

In this form each computation is spelled by one operation, the operations of ``fastdiff.ops`` are
replaced by their PyTorch equivalents, and nodes that return their input unchanged are removed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

import fastdiff.ops  # noqa: F401 - defines the operations
from fastdiff.compiler.graph.edit import call, replace
from fastdiff.compiler.graph.effects import functionalise
from fastdiff.compiler.graph.nodes import (
    argument,
    conversion,
    dtype_of,
    inline_modules,
    is_number,
    op,
    value,
)


def mark_parameters(gm: GraphModule, example_inputs: list[Any]) -> None:
    """Mark the placeholders that are parameters; add example values to placeholders without one."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, example in zip(placeholders, example_inputs, strict=True):
        node.meta.setdefault("example_value", example)
        examples = (example, node.meta["example_value"])
        node.meta["fastdiff_parameter"] = any(isinstance(x, nn.Parameter) for x in examples)


def canonicalise(gm: GraphModule) -> None:
    """Rewrite ``gm`` in place; its values stay the same."""
    inline_modules(gm)
    functionalise(gm.graph)
    for node in list(gm.graph.nodes):
        if is_inert(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif node.op == "call_function" and node.target in _DECOMPOSITIONS:
            _DECOMPOSITIONS[node.target](gm.graph, node)
        elif op(node) == "mul":
            _swish(gm.graph, node)


def is_inert(node: Node) -> bool:
    """Whether a node returns its input unchanged."""
    if op(node) == "dropout":
        p, training = argument(node, "p", 0.5), argument(node, "training", True)
        return training is False or (is_number(p) and p == 0)
    return op(node) == "to" and conversion(node) == dtype_of(node.args[0])


def _swish(graph: Graph, node: Node) -> None:
    """Replace x * sigmoid(x) by silu(x)."""
    a, b = argument(node, "input"), argument(node, "other")
    for x, gate in ((a, b), (b, a)):
        if op(gate) == "sigmoid" and argument(gate, "input") is x:
            with graph.inserting_before(node):
                replace(node, call(graph, F.silu, x, like=x))
            if not gate.users:
                graph.erase_node(gate)
            return


def _per_pixel(graph: Graph, emb: Any, like: Node) -> Node:
    """emb [N, C] as [N, C, 1, ...], which broadcasts to the pixels of ``like``."""
    example = value(like)
    assert example is not None
    index = (slice(None), slice(None), *[None] * (example.ndim - 2))
    return call(graph, operator.getitem, emb, index)


def _group_norm_silu(graph: Graph, node: Node) -> None:
    x, groups, weight, bias, eps, add, scale, shift, residual, silu, skip, _ = node.args
    users = list(node.users)
    if not all(op(user) == "getitem" and user.args[1] == 0 for user in users if user.users):
        return
    with graph.inserting_before(node):
        if skip is not None:
            x = call(graph, torch.cat, [x, skip], dim=1)
        assert isinstance(x, Node)
        if add is not None:
            x = call(graph, operator.add, x, _per_pixel(graph, add, x), like=x)
        h = call(graph, F.group_norm, x, groups, weight, bias, eps, like=x)
        if scale is not None:
            factor = _per_pixel(graph, scale, h)
            factor = call(graph, operator.add, factor, 1, like=factor)
            h = call(graph, operator.mul, h, factor, like=x)
        if shift is not None:
            h = call(graph, operator.add, h, _per_pixel(graph, shift, h), like=x)
        if silu:
            h = call(graph, F.silu, h, like=x)
        if residual is not None:
            h = call(graph, operator.add, h, residual, like=x)
    for user in users:
        replace(user, h)
    graph.erase_node(node)


def _add_time_embedding(graph: Graph, node: Node) -> None:
    x, emb = node.args
    assert isinstance(x, Node)
    with graph.inserting_before(node):
        replace(node, call(graph, operator.add, x, _per_pixel(graph, emb, x), like=x))


def _upsample_nearest2x(graph: Graph, node: Node) -> None:
    with graph.inserting_before(node):
        x = node.args[0]
        replace(node, call(graph, F.interpolate, x, scale_factor=2.0, mode="nearest", like=node))


_DECOMPOSITIONS: dict[Any, Callable[[Graph, Node], None]] = {
    torch.ops.fastdiff.group_norm_silu.default: _group_norm_silu,
    torch.ops.fastdiff.add_time_embedding.default: _add_time_embedding,
    torch.ops.fastdiff.upsample_nearest2x.default: _upsample_nearest2x,
}
