"""Find the fused convolutions of a graph: each is an anchor, its prologue and its epilogue.

An anchor is a convolution or a linear layer. Its prologue is followed upwards from its input, its
epilogue downwards from its result. Both end before the first node that cannot be fused, so a node
that is in doubt stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from fastdiff.compiler.match.epilogue import epilogue
from fastdiff.compiler.match.fused import Activation, Match, anchor
from fastdiff.compiler.match.patterns import FUSED_DTYPES, Readers
from fastdiff.compiler.match.prologue import prologue


def find(
    graph: Graph,
    pinned: set[Node],
    *,
    prologues: bool = True,
    gains: bool = False,
    dtypes: Sequence[torch.dtype] = FUSED_DTYPES,
) -> list[Match]:
    """All fused convolutions of a graph, in its order.

    Args:
        graph: in canonical form.
        pinned: nodes that must stay as they are.
        prologues: whether matches may include a prologue, and constants that weights are
            multiplied by.
        gains: whether a prologue may multiply channels by gains without a norm.
        dtypes: the dtypes that a match may have.
    """
    candidates = (anchor(node, dtypes) for node in graph.nodes if node not in pinned)
    matches = [match for match in candidates if match is not None]
    anchors = {m.anchor for m in matches}
    order = {node: i for i, node in enumerate(graph.nodes)}
    claimed = set(anchors)
    if prologues:
        readers = Readers(anchors)
        for match in matches:
            prologue(match, readers, pinned, gains=gains)
    # 1x1 convolutions come last: the sum of a 3x3 one and a 1x1 shortcut is fused with the 3x3 one.
    for match in sorted(matches, key=lambda m: (m.spec.kernel == (1, 1), order[m.anchor])):
        epilogue(match, claimed, pinned, factors=prologues)
    _mark_statistics(matches)
    return matches


def _mark_statistics(matches: Iterable[Match]) -> None:
    """Let each convolution whose result a norm reads collect that norm's statistics."""
    by_end = {m.end: m for m in matches}
    for match in matches:
        if match.norm is None:
            continue
        sources = [match.x] if match.skip is None else [match.x, Activation(match.skip, 1)]
        for source in sources:
            before = by_end.get(source)
            if before is not None and not before.spec.gated:
                before.spec = replace(before.spec, statistics=True)
