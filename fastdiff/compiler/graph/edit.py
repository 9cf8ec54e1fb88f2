"""How a graph is changed: nodes of the compiler's own are marked, unused ones removed."""

from __future__ import annotations

from torch.fx import Graph

from fastdiff.compiler.graph.effects import is_known, is_random, written

OURS = "fastdiff"  # marks, in a node's meta, what the rewriter put in


def remove_unused(graph: Graph) -> None:
    """Erase nodes that nobody reads and that do nothing but compute."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        computes = is_known(node) and not written(node) and not is_random(node)
        if node.op == "get_attr" or node.meta.get(OURS) or computes:
            graph.erase_node(node)
