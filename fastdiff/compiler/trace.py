"""Trace a function of tensors as a graph, by recording one run: for networks of this library.

Dynamo analyses any Python code; that takes seconds, and adds guards on everything that it reads.
The layers of a network whose code is known need no analysis: one run, whose calls of PyTorch are
recorded under the names by which they are called, gives the graph that Dynamo would give.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

BATCH = 2  # images in the run; with one, an expansion to the batch could not be recognised


class NotTraceableError(Exception):
    """A function has no graph that computes the same; the message says why."""


def trace(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[GraphModule, list[int]]:
    """The graph of one run of ``function``, which serves any number of images.

    The function may use the number of images in ``Tensor.expand`` alone. All other sizes must be
    the same in every call.

    Args:
        function: computes a tensor from ``inputs`` and ``weights`` by calls of PyTorch.
        inputs: its arguments, real tensors; the first has ``BATCH`` rows.
        weights: the other tensors that it may read.

    Returns:
        The graph, whose placeholders are ``inputs`` and then the weights that it reads, and the
        indices of these weights. The example values of nodes are on the device meta: they take no
        memory.

    Raises:
        NotTraceableError: the function reads other tensors, or writes to a tensor.
    """
    recorder = _Recorder(inputs, weights)
    with torch.no_grad(), recorder:
        result = function(*inputs)
    recorder.graph.output((recorder.node(result),))
    return GraphModule(nn.Module(), recorder.graph), recorder.read


class _Recorder(TorchFunctionMode):
    """Records every call in its ``with`` block that makes a tensor.

    Attributes:
        graph: the recorded calls.
        read: the indices of the weights that were read, in the order of their placeholders.
    """

    def __init__(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = Graph()
        self.read: list[int] = []
        self.nodes: Any = WeakIdKeyDictionary()
        self.weights: Any = WeakIdKeyDictionary()
        for i, weight in enumerate(weights):
            self.weights.setdefault(weight, i)
        for i, x in enumerate(inputs):
            self.last = self.graph.placeholder(f"input_{i}")  # the last placeholder
            self._know(self.last, x, weight=False)
        self.images = next(iter(self.graph.nodes))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a call, and record it."""
        kwargs = kwargs or {}
        if _writes(func, kwargs):
            raise NotTraceableError(f"{func} writes to a tensor")
        result = func(*args, **kwargs)
        made = result if isinstance(result, (tuple, list)) else (result,)
        if any(isinstance(x, Tensor) and not self._knows(x) for x in made):
            self._note(func, args, kwargs, result)
        return result

    def node(self, x: Tensor) -> Node:
        """The node whose value is the tensor ``x``."""
        if x in self.nodes:
            return self.nodes[x]
        if x not in self.weights:
            raise NotTraceableError(f"a tensor {tuple(x.shape)} that is neither input nor weight")
        i = self.weights[x]
        with self.graph.inserting_after(self.last):
            self.last = self.graph.placeholder(f"weight_{i}")
        self.read.append(i)
        self._know(self.last, x, weight=True)
        return self.last

    def _knows(self, x: Tensor) -> bool:
        return x in self.nodes or x in self.weights

    def _know(self, node: Node, x: Tensor, *, weight: bool) -> None:
        self.nodes[x] = node
        node.meta |= {"example_value": _example(x), "fastdiff_parameter": weight}

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        def argument(value: Any) -> Any:
            return self.node(value) if isinstance(value, Tensor) else value

        positional: Any = map_aggregate(args, argument)
        named: Any = map_aggregate(kwargs, argument)
        if func == Tensor.expand and positional[1] == BATCH:
            images = self.graph.call_method("size", (self.images, 0))
            images.meta["example_value"] = BATCH
            positional = (positional[0], images, *positional[2:])
        name = func.__name__
        if func == Tensor.__getitem__:
            node = self.graph.call_function(operator.getitem, positional, named)
        elif getattr(Tensor, name, None) == func:
            node = self.graph.call_method(name, positional, named)
        else:
            node = self.graph.call_function(func, positional, named)
        if isinstance(result, Tensor):
            self._know(node, result, weight=False)
            return
        node.meta["example_value"] = map_aggregate(result, _example)
        for i, part in enumerate(result):
            self._know(self.graph.call_function(operator.getitem, (node, i)), part, weight=False)


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes to an existing tensor."""
    if kwargs.get("out") is not None or kwargs.get("inplace"):
        return True
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = func.__name__
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name != "__invert__")


def _example(x: Any) -> Any:
    """A tensor on the device meta with the shape, strides and dtype of x; others unchanged."""
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
