"""Changes of a graph: insert nodes, replace nodes, remove nodes that no node reads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fastdiff.compiler.graph.dtypes import in_dtype
from fastdiff.compiler.graph.effects import is_known, is_random, written
from fastdiff.compiler.graph.nodes import value

OURS = "fastdiff"  # the key in ``Node.meta`` that marks nodes inserted by this compiler


def call(
    graph: Graph,
    target: Callable[..., Any] | str,
    *args: Any,
    like: Node | None = None,
    **kwargs: Any,
) -> Node:
    """A new node of an operation, or of a method's name, with an example of its value.

    The example is that of ``like``, a node of the same shape and dtype, or is computed. Computing
    it on the device meta may run Python code of PyTorch that imports much of its compiler.
    """
    if isinstance(target, str):
        node = graph.call_method(target, args, kwargs)
    else:
        node = graph.call_function(target, args, kwargs)
    node.meta["example_value"] = _example(node) if like is None else value(like)
    return node


def convert_to(graph: Graph, x: Node, dtype: torch.dtype) -> Node:
    """A new node that converts a tensor to ``dtype``."""
    node = graph.call_method("to", (x, dtype))
    node.meta["example_value"] = in_dtype(value(x), dtype)
    return node


def call_ours(graph: Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A new node marked as ``OURS``: its operation chooses the strides of its value."""
    node = graph.call_function(target, args, kwargs)
    node.meta[OURS] = True
    return node


def redirect(old: Node, new: Node) -> None:
    """Make all readers of ``old`` read ``new``, which has the same value."""
    new.meta.setdefault("example_value", old.meta.get("example_value"))
    old.replace_all_uses_with(new)


def replace(old: Node, new: Node) -> None:
    """Make all readers of ``old`` read ``new``, and erase ``old``."""
    redirect(old, new)
    old.graph.erase_node(old)


def remove_unused(graph: Graph) -> None:
    """Erase nodes that no node reads and that have no effect besides their result."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        computes = is_known(node) and not written(node) and not is_random(node)
        if node.op == "get_attr" or node.meta.get(OURS) or computes:
            graph.erase_node(node)


def _example(node: Node) -> Any:
    """The value of a node, computed from the example values of its arguments."""

    def example(source: Node) -> Any:
        tensor = value(source)
        return source.meta.get("example_value") if tensor is None else tensor

    args, kwargs = map_arg(node.args, example), map_arg(node.kwargs, example)
    mode = next((x.fake_mode for x in map(value, node.all_input_nodes)
                 if isinstance(x, FakeTensor)), None)  # fmt: skip
    # Python's decompositions are enabled: the C++ ones would replace symbolic sizes by numbers.
    dispatcher = nullcontext if mode is None else enable_python_dispatcher
    with torch.no_grad(), mode or nullcontext(), dispatcher():
        if isinstance(node.target, str):
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)
