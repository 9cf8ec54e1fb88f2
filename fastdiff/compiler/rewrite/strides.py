"""Restore the strides of eager mode where the caller or a node of the graph depends on them.

The fused operations return channels-last memory whatever the strides of their inputs. Nodes that
compute the same for any strides read it as it is. Every other node, and the caller, gets a copy
with the strides that the value has in eager mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fastdiff.compiler.graph.edit import OURS
from fastdiff.compiler.graph.effects import ALIASING_OPS, FRESH_OPS, is_random, name_of
from fastdiff.compiler.graph.nodes import op, value
from fastdiff.compiler.run import calls


def restore_strides(graph: Graph, pinned: set[Node]) -> None:
    """Insert copies where a node or the caller depends on strides that have changed."""
    foreign: set[Node] = set()
    restored: dict[Node, Node] = {}

    def eager(node: Node) -> Node:
        if node not in foreign:
            return node
        if node not in restored:
            restored[node] = _restored(graph, node)
        return restored[node]

    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.meta.get(OURS):
            foreign.add(node)
        elif node not in pinned and _takes_any(node):
            if any(source in foreign for source in node.all_input_nodes):
                if op(node) == "view":
                    node.target = "reshape"
                if op(node) != "contiguous":
                    foreign.add(node)
        elif any(source in foreign for source in node.all_input_nodes):
            node.args = map_arg(node.args, eager)
            node.kwargs = map_arg(node.kwargs, eager)


def _takes_any(node: Node) -> bool:
    """Whether a node computes the same values for any strides of its inputs."""
    name = name_of(node)
    if is_random(node):  # random numbers go to elements in the order of the memory
        return False
    if name == "view":  # a view as another dtype depends on strides
        before, after = value(node.args[0]), value(node)
        return before is not None and after is not None and before.dtype == after.dtype
    return name in FRESH_OPS or name in ALIASING_OPS


def _restored(graph: Graph, node: Node) -> Node:
    example = value(node)
    if example is None:
        return node
    target = calls.restore(*_memory_of(example))
    with graph.inserting_after(node):
        new = graph.call_function(target, (node,))
    new.meta["example_value"] = example
    return new


def _memory_of(x: torch.Tensor) -> tuple[tuple[int, ...] | None, list[int]]:
    """A tensor's strides if they are known, and its dimensions from the outermost inwards."""
    strides: Sequence[Any] = x.stride()
    known = all(isinstance(s, int) for s in (*strides, *x.shape))
    hints = [s if isinstance(s, int) else s.node.hint for s in strides]
    order = sorted(range(x.ndim), key=lambda d: -hints[d])
    dense = x.numel() == 0 or all(h != 0 for h in hints) if known else True
    return (tuple(strides) if known and dense else None), order
