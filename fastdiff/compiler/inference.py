"""Fuse a graph without gradients on a CPU: calls the stages of the compiler in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from fastdiff import ops
from fastdiff.compiler.choose.plan import plan
from fastdiff.compiler.graph.canonical import canonicalise
from fastdiff.compiler.graph.edit import remove_unused
from fastdiff.compiler.graph.effects import pinned_nodes
from fastdiff.compiler.graph.nodes import is_weight
from fastdiff.compiler.match.anchors import find
from fastdiff.compiler.report import GraphReport
from fastdiff.compiler.rewrite import composed, computed
from fastdiff.compiler.rewrite.autocast import Autocast, make_explicit
from fastdiff.compiler.rewrite.fuse import fuse
from fastdiff.compiler.rewrite.gated import gated
from fastdiff.compiler.rewrite.low_rank import fold
from fastdiff.compiler.rewrite.lower import lower
from fastdiff.compiler.rewrite.strides import restore_strides
from fastdiff.compiler.rewrite.weights_node import convert_once, mark_droppable
from fastdiff.compiler.run.calls import without_autocast
from fastdiff.compiler.run.replay import Replay

Compiled = Callable[..., Any]


def fused(
    gm: GraphModule,
    report: GraphReport,
    *,
    measured: bool,
    precision: str = "fast",
    packed_bytes: int | None = None,
    drop_weights: bool = False,
) -> Compiled:
    """Fuse a graph, and return it as a function of its inputs, parameters among them.

    Args:
        gm: a graph of functions of ``torch`` and ``torch.nn.functional`` and methods of tensors,
            with example values and a mark on each placeholder that is a parameter; rewritten in
            place. It computes in the autocast, or without, in which this function is called.
        report: what was fused and what was left is written to it.
        measured: choose algorithms by measured times, else by the sizes alone.
        precision: see ``fastdiff.compiler.backend``.
        packed_bytes: see ``fastdiff.compiler.backend``.
        drop_weights: see ``fastdiff.compiler.backend``.
    """
    around = Autocast.around()
    with torch.autocast("cpu", enabled=False):
        compiled = _fused(gm, report, around, measured, precision, packed_bytes, drop_weights)
    return without_autocast(compiled) if around.enabled else compiled


def _fused(
    gm: GraphModule,
    report: GraphReport,
    around: Autocast,
    measured: bool,
    precision: str,
    packed_bytes: int | None,
    drop_weights: bool,
) -> Compiled:
    """``fused``, as a function to be called without autocast."""
    graph = gm.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    remove_unused(graph)
    canonicalise(gm)
    make_explicit(gm, around)
    remove_unused(graph)
    pinned = pinned_nodes(graph)
    lower(graph, pinned, precision)
    remove_unused(graph)
    computed.once(graph, pinned)
    # Sums of weights round, and the bound does not count their memory.
    if precision != "strict" and packed_bytes is None:
        fold(graph, pinned)
    gated(graph, pinned)
    order = {node: i for i, node in enumerate(graph.nodes)}
    chosen = plan(find(graph, pinned, gains=True), order, pinned, precision, packed_bytes, measured)
    fusion = fuse(graph, chosen, pinned)
    report.emitted = fusion.emitted
    report.composed = composed.norms(graph, pinned, alone=True)
    report.composed += sum(node.target is ops.geglu for node in graph.nodes)
    weights = convert_once(graph, fusion.weights)
    restore_strides(graph, pinned)
    report.leave(graph, pinned)
    graph.lint()
    gm.recompile()
    if weights is None:
        return gm.forward
    if drop_weights:
        mark_droppable(weights)
    varying = [i for i, node in enumerate(placeholders) if not is_weight(node)]
    return Replay(gm, weights, varying)
