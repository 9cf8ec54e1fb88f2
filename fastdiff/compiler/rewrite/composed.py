"""Replace nodes by public operations of ``fastdiff.ops``, which have gradients or GPU kernels.

``norms`` is for norms that are not fused with a convolution on a CPU, ``training`` for graphs on a
CPU that are not fused, ``gpu`` for graphs of CUDA tensors, which Inductor compiles.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fastdiff import ops
from fastdiff.compiler.graph.dtypes import parameter_of
from fastdiff.compiler.graph.edit import call_ours, convert_to, redirect, remove_unused
from fastdiff.compiler.graph.effects import functionalise, pinned_nodes
from fastdiff.compiler.graph.nodes import argument, dtype_of, equal, is_number, op, value
from fastdiff.compiler.match.anchors import find
from fastdiff.compiler.match.fused import Match
from fastdiff.compiler.match.patterns import one_plus, pair_of, per_channel, repeats

_OP_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Statistics = dict[Node, Node]  # for an activation, the node that gives its channel statistics


def norms(
    graph: Graph, pinned: set[Node], statistics: Statistics | None = None, *, alone: bool = False
) -> int:
    """Replace group_norm -> scale and shift -> silu by ``ops.group_norm_silu``.

    Args:
        graph: changed in place.
        pinned: nodes that must stay as they are.
        statistics: for an activation, the node that gives its channel statistics.
        alone: replace norms without an activation too. PyTorch's group_norm computes the variance
            of channels-last tensors as a difference of squares, which is wrong for large means.

    Returns:
        The number of operations inserted.
    """
    count = 0
    for node in list(graph.nodes):
        silu = op(node) == "silu"
        if node in pinned or not (silu or (alone and op(node) == "group_norm")):
            continue
        of_norm = _group_norm_silu(node, argument(node, "input") if silu else node, pinned,
                                   statistics or {}, convert=alone)  # fmt: skip
        if of_norm is None:
            continue
        args, kwargs = of_norm
        if not silu:
            kwargs["silu"] = False
        with graph.inserting_before(node):
            redirect(node, call_ours(graph, ops.group_norm_silu, *args, **kwargs))
        count += 1
    remove_unused(graph)
    return count


def training(gm: GraphModule) -> int:
    """Insert operations that have gradients on a CPU; the number of them is returned."""
    functionalise(gm.graph)
    return norms(gm.graph, pinned_nodes(gm.graph))


def _group_norm_silu(
    node: Node, here: Any, pinned: set[Node], statistics: Statistics, *, convert: bool
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of the ``ops.group_norm_silu`` that computes ``node``; None where it cannot.

    ``here`` is the input of the SiLU: a group norm, or its scale or shift. With ``convert``, a gain
    and an offset that are parameters of another dtype than x are converted to that of x.
    """
    kwargs: dict[str, Any] = {}
    path = [here]
    if op(here) == "add" and (operands := per_channel(here)) is not None:
        here, shift = operands
        kwargs["shift"] = shift
        path.append(here)
    if op(here) == "mul" and (operands := per_channel(here)) is not None:
        here, factor = operands
        kwargs["scale"] = one_plus(factor)
        if kwargs["scale"] is None:
            return None
        path.append(here)
    x = argument(here, "input") if op(here) == "group_norm" else None
    example = value(x)
    if example is None or example.dtype not in _OP_DTYPES or pinned.intersection(path):
        return None
    if any(n is not node and len(n.users) != 1 for n in path) or dtype_of(node) != example.dtype:
        return None
    groups, eps = argument(here, "num_groups"), argument(here, "eps", 1e-5)
    weight, bias = argument(here, "weight"), argument(here, "bias")
    if not isinstance(groups, int) or not is_number(eps):
        return None
    for v in (weight, bias):
        fits = v is None or dtype_of(v) == example.dtype
        if not fits and not (convert and parameter_of(v)):
            return None
    for name, v in list(kwargs.items()):
        row = value(v)
        if row is None or row.dtype != example.dtype:
            return None
        if not equal(row.shape[0], example.shape[0]):
            return None
        with node.graph.inserting_before(node):
            kwargs[name] = node.graph.call_function(torch.flatten, (v, 1))
    with node.graph.inserting_before(node):
        weight, bias = (_in_dtype(v, example.dtype) for v in (weight, bias))
    both = pair_of(x) if isinstance(x, Node) else None
    if both is not None:
        x, kwargs["skip"] = both
    elif x in statistics:
        kwargs["statistics"] = statistics[x]
    return (x, groups, weight, bias, eps), kwargs


def _in_dtype(parameter: Node | None, dtype: torch.dtype) -> Node | None:
    source = None if dtype_of(parameter) == dtype else parameter_of(parameter)
    return parameter if source is None else convert_to(source.graph, source, dtype)


def gpu(gm: GraphModule) -> int:
    """Insert operations that have kernels for CUDA tensors; the number of them is returned."""
    graph = gm.graph
    functionalise(graph)
    pinned = pinned_nodes(graph)
    matches = [m for m in find(graph, pinned, prologues=False, dtypes=_OP_DTYPES)]
    statistics: Statistics = {}
    count = 0
    for match in matches:
        adds = match.emb is not None or match.residual is not None
        if not adds or match.kind != "conv2d" or match.end.form != (4, 1):
            continue
        _epilogue(graph, match, statistics)
        count += 1
    count += norms(graph, pinned, statistics)
    for node in list(graph.nodes):
        if op(node) == "interpolate" and node not in pinned and repeats(node) == (2, 2):
            with graph.inserting_before(node):
                new = graph.call_function(ops.upsample_nearest2x, (argument(node, "input"),))
            redirect(node, new)
            count += 1
    remove_unused(graph)
    return count


def _epilogue(graph: Graph, match: Match, statistics: Statistics) -> None:
    """Split a match into a convolution without bias and an ``ops.conv_epilogue``."""
    conv, end = match.anchor, match.end.node
    wanted = not match.scale and any(
        op(user) == "group_norm" and argument(user, "input") is end for user in end.users
    )
    with graph.inserting_before(end):
        sizes = [argument(conv, name, default) for name, default in
                 (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))]  # fmt: skip
        bare = graph.call_function(
            torch.conv2d, (match.x.node, argument(conv, "weight"), None, *sizes)
        )
        emb = match.emb
        if emb is not None:
            emb = graph.call_function(torch.flatten, (emb, 1))
            rows = value(match.emb)
            assert rows is not None
            if isinstance(rows.shape[0], int) and rows.shape[0] == 1:
                count = graph.call_method("size", (match.x.node, 0))
                emb = graph.call_method("expand", (emb, count, -1))
        both = graph.call_function(
            ops.conv_epilogue, (bare, match.bias, emb, match.residual), {"statistics": wanted}
        )
        y = graph.call_function(operator.getitem, (both, 0))
        y.meta["example_value"] = end.meta.get("example_value")
        for factor, times in match.scale:
            y = graph.call_function(operator.mul if times else operator.truediv, (y, factor))
            y.meta["example_value"] = end.meta.get("example_value")
        if wanted:
            statistics[y] = graph.call_function(operator.getitem, (both, 1))
    redirect(end, y)
