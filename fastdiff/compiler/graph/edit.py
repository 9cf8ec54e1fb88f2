"""How a graph is changed: nodes are inserted, replaced, and removed when nobody reads them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fastdiff.compiler.graph.effects import is_known, is_random, written
from fastdiff.compiler.graph.nodes import value

OURS = "fastdiff"  # marks, in a node's meta, the nodes that the compiler puts in


def call(
    graph: Graph,
    target: Callable[..., Any] | str,
    *args: Any,
    like: Node | None = None,
    **kwargs: Any,
) -> Node:
    """A new node of an operation, or of a method's name, with an example of its value.

    The example is that of ``like``, a node of the same shape and dtype, or is computed. On the
    device meta PyTorch computes some operations in Python, which imports much of its compiler.
    """
    if isinstance(target, str):
        node = graph.call_method(target, args, kwargs)
    else:
        node = graph.call_function(target, args, kwargs)
    node.meta["example_value"] = _example(node) if like is None else value(like)
    return node


def call_ours(graph: Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A new node of the compiler's own, whose value has the memory that its operation chooses."""
    node = graph.call_function(target, args, kwargs)
    node.meta[OURS] = True
    return node


def redirect(old: Node, new: Node) -> None:
    """Everybody who reads ``old`` reads ``new``, which has the same value."""
    new.meta.setdefault("example_value", old.meta.get("example_value"))
    old.replace_all_uses_with(new)


def replace(old: Node, new: Node) -> None:
    """:func:`redirect`, and ``old`` is gone."""
    redirect(old, new)
    old.graph.erase_node(old)


def remove_unused(graph: Graph) -> None:
    """Erase nodes that nobody reads and that do nothing but compute."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        computes = is_known(node) and not written(node) and not is_random(node)
        if node.op == "get_attr" or node.meta.get(OURS) or computes:
            graph.erase_node(node)


def _example(node: Node) -> Any:
    """The value of a node for the examples that its arguments have."""

    def example(source: Node) -> Any:
        tensor = value(source)
        return source.meta.get("example_value") if tensor is None else tensor

    args, kwargs = map_arg(node.args, example), map_arg(node.kwargs, example)
    mode = next((x.fake_mode for x in map(value, node.all_input_nodes)
                 if isinstance(x, FakeTensor)), None)  # fmt: skip
    # Through Python, or operations made of others would fix the sizes that are to stay symbols.
    dispatcher = nullcontext if mode is None else enable_python_dispatcher
    with torch.no_grad(), mode or nullcontext(), dispatcher():
        if isinstance(node.target, str):
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)
