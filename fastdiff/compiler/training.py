"""Fuse a graph with gradients on a CPU: calls the stages of the compiler in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from fastdiff import ops
from fastdiff.compiler.choose.plan import merged
from fastdiff.compiler.graph.canonical import canonicalise
from fastdiff.compiler.graph.edit import remove_unused
from fastdiff.compiler.graph.effects import pinned_nodes
from fastdiff.compiler.graph.regions import recomputed_regions
from fastdiff.compiler.match.anchors import find
from fastdiff.compiler.report import GraphReport
from fastdiff.compiler.rewrite import composed, computed
from fastdiff.compiler.rewrite.autocast import Autocast, make_explicit
from fastdiff.compiler.rewrite.fuse_training import fuse_training, may_train
from fastdiff.compiler.rewrite.gated import gated
from fastdiff.compiler.rewrite.strides import restore_strides
from fastdiff.compiler.run.calls import without_autocast

Compiled = Callable[..., Any]


def trained(gm: GraphModule, report: GraphReport, *, precision: str = "fast") -> Compiled:
    """Fuse a graph, and return it as a function of its inputs that autograd can differentiate.

    Args:
        gm: as for ``inference.fused``; regions that are computed twice are fused too.
        report: what was fused and what was left is written to it.
        precision: ``strict`` for direct arithmetic alone.
    """
    around = Autocast.around()
    with torch.autocast("cpu", enabled=False):
        _rewrite(gm, report, around, precision == "strict")
    return without_autocast(gm.forward) if around.enabled else gm.forward


def _rewrite(gm: GraphModule, report: GraphReport, around: Autocast, strict: bool) -> None:
    graph = gm.graph
    for region in recomputed_regions(graph):
        _rewrite(region, report, around, strict)
    remove_unused(graph)
    canonicalise(gm)
    make_explicit(gm, around)
    remove_unused(graph)
    pinned = pinned_nodes(graph)
    computed.at_each_call(graph, pinned)
    order = {node: i for i, node in enumerate(graph.nodes)}
    groups, single = merged(list(filter(may_train, find(graph, pinned))), order)
    report.emitted += fuse_training(graph, groups, single, pinned, strict=strict)
    gated(graph, pinned)  # after the layers, which compute no gate where gradients are wanted
    report.composed += composed.norms(graph, pinned, alone=True)
    report.composed += sum(node.target is ops.geglu for node in graph.nodes)
    restore_strides(graph, pinned)
    report.leave(graph, pinned)
    graph.lint()
    gm.recompile()
