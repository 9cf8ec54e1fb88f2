"""Which nodes become one convolution: what it reads through, what it writes through.

An anchor is a convolution or a linear layer. Its prologue is followed up from its input, its
epilogue down from its result; both stop at the first node that does not fit, so that in doubt a
node stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from fastdiff.compiler.match.epilogue import epilogue
from fastdiff.compiler.match.fused import Activation, Match, anchor
from fastdiff.compiler.match.patterns import DTYPES, Readers
from fastdiff.compiler.match.prologue import prologue


def find(
    graph: Graph,
    pinned: set[Node],
    *,
    prologues: bool = True,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> list[Match]:
    """All fused convolutions of a graph, in its order.

    Args:
        graph: normalised.
        pinned: nodes that must stay as they are.
        prologues: whether convolutions may read through what stands before them.
        dtypes: that they may have.
    """
    anchors_found = (anchor(node, dtypes) for node in graph.nodes if node not in pinned)
    matches = [match for match in anchors_found if match is not None]
    anchors = {m.anchor for m in matches}
    order = {node: i for i, node in enumerate(graph.nodes)}
    claimed = set(anchors)
    if prologues:
        readers = Readers(anchors)
        for match in matches:
            prologue(match, readers, pinned)
    # What adds a 1x1 shortcut to a 3x3 convolution goes to the latter.
    for match in sorted(matches, key=lambda m: (m.spec.kernel == (1, 1), order[m.anchor])):
        epilogue(match, claimed, pinned)
    _mark_statistics(matches)
    return matches


def _mark_statistics(matches: Iterable[Match]) -> None:
    """A convolution collects the statistics of what a norm reads."""
    by_end = {m.end: m for m in matches}
    for match in matches:
        if match.norm is None:
            continue
        sources = [match.x] if match.skip is None else [match.x, Activation(match.skip, 1)]
        for source in sources:
            before = by_end.get(source)
            if before is not None and not before.spec.gated:
                before.spec = replace(before.spec, statistics=True)
