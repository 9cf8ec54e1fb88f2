"""Compute a graph in another dtype than its tensors have: for speed, or as no kernel has theirs.

``precision="bf16"`` computes float32 and float16 graphs in bfloat16. All other precisions compute
float16 in float32, for which there are kernels on a CPU: that is more accurate, and quicker.

Layers (convolutions and linear layers) read the new dtype and give it. Values derived from theirs
stay in it through operations that compute in any dtype: additions, concatenations, activations,
norms (whose statistics are float32 in any case), reshapes, products of matrices. All other
operations get values of the dtype that the graph has for them, by explicit conversions. So does
the caller. What no layer has touched, as the embedding of the time before its first layer, is
computed as before.

    x: float32                      x: float32
    h  = conv2d(x, w, b)            h  = conv2d(x.to(bf16), w.to(bf16), b.to(bf16))
    h1 = add(h, x)           ->     h1 = add(h, x.to(bf16))
    p  = softmax(h1, 1)             p  = softmax(h1.to(float32), 1)
    return h1                       return h1.to(float32)

Conversions of parameters are computed once, not at every call (``rewrite.fuse``), and a fused
layer packs its weight straight from the parameter.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Graph, Node

from fastdiff.compiler.graph.canonical import is_inert
from fastdiff.compiler.graph.dtypes import (
    NARROW_DTYPES,
    floating,
    follows,
    in_dtype,
    is_elementwise,
    is_layer,
    is_norm,
    is_product,
)
from fastdiff.compiler.graph.edit import convert_to
from fastdiff.compiler.graph.effects import asks_for_sizes
from fastdiff.compiler.graph.nodes import conversion, dtype_of, is_weight, op, value


def lower(graph: Graph, pinned: set[Node], precision: str) -> None:
    """Compute what can be computed in another dtype in that of ``precision``.

    Args:
        graph: in canonical form; changed in place. The dtypes of its results stay the same.
        pinned: nodes that must stay as they are.
        precision: a key of ``choose.algorithms.PRECISIONS``.
    """
    if precision == "bf16":
        _Lowering(graph, pinned, (torch.float32, torch.float16), torch.bfloat16).run()
    else:
        _Lowering(graph, pinned, (torch.float16,), torch.float32).run()


class _Lowering:
    """Computes values of the dtypes ``sources`` in ``target``.

    Attributes:
        declared: for a node whose value is now of the dtype ``target``, an example of its value as
            the graph declares it.
        derived: nodes that read what a layer has computed, directly or through others.
        converted: the conversions so far, by node and dtype.
        last: elementwise operations whose values only the caller reads.
        exact: whether ``target`` has all numbers of ``sources``.
        first: the first node that computes. Conversions of parameters come before it.
    """

    def __init__(
        self, graph: Graph, pinned: set[Node], sources: tuple[torch.dtype, ...], target: torch.dtype
    ) -> None:
        self.graph, self.pinned = graph, pinned
        self.sources, self.target = sources, target
        self.declared: dict[Node, Any] = {}
        self.derived: set[Node] = set()
        self.converted: dict[tuple[Node, torch.dtype], Node] = {}
        self.last: set[Node] = set()
        self.exact = torch.promote_types(target, sources[0]) == target
        self.first = next(node for node in graph.nodes if node.op != "placeholder")

    def run(self) -> None:
        """Lower the graph."""
        nodes = list(self.graph.nodes)
        for node in reversed(nodes):
            if is_elementwise(node) and all(
                user.op == "output" or user in self.last for user in node.users
            ):
                self.last.add(node)
        for node in nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            if any(x in self.derived for x in node.all_input_nodes) or is_layer(node):
                self.derived.add(node)
            with self.graph.inserting_before(node):
                self._visit(node)
        self._tidy()

    def _tidy(self) -> None:
        """Remove conversions to a dtype that a value has already, and second ones of one value."""
        seen: dict[tuple[Any, torch.dtype | None], Node] = {}
        for node in list(self.graph.nodes):
            if conversion(node) is None or node in self.pinned:
                continue
            source = node.args[0]
            if not is_inert(node):
                # The caller may write to what it gets: no two of its tensors become one.
                if any(user.op == "output" for user in node.users):
                    continue
                first = seen.setdefault((source, dtype_of(node)), node)
                if first is node:
                    continue
                source = first
            node.replace_all_uses_with(source)
            self.graph.erase_node(node)

    def _visit(self, node: Node) -> None:
        example = floating(node)
        if node in self.pinned or example is None:
            self._restore(node)
        elif conversion(node) is not None:
            self._convert(node, example.dtype)
        elif example.dtype not in (*self.sources, self.target) or not self._can_lower(node):
            self._restore(node)
        else:
            norm = is_norm(node)
            for x in node.all_input_nodes:
                gain = norm and x is not node.args[0]
                # A norm takes its gain and offset in float32, whatever it normalises.
                self._replace(node, x, torch.float32 if gain else self.target)
            if example.dtype != self.target:
                self._declare(node)

    def _can_lower(self, node: Node) -> bool:
        """Whether a node can be computed in ``target``, and follows from what is."""
        inputs = [x for x in node.all_input_nodes if floating(x) is not None]
        if any(self._declared(x) not in NARROW_DTYPES for x in inputs):
            return False
        if is_layer(node):
            return dtype_of(node) != self.target
        lowered = [x in self.declared for x in inputs]
        if not any(lowered) or not (follows(node) or is_product(node)):
            return False
        if node in self.last and not self.exact and not all(lowered):
            # x - sigma * model(x), say: the caller's x is not rounded.
            return all(is_weight(x) for x, low in zip(inputs, lowered, strict=True) if not low)
        parts = node.meta.get("example_value")
        # Several tensors in one value cannot be converted back at once.
        return value(node) is not None or (
            isinstance(parts, (tuple, list)) and all(op(user) == "getitem" for user in node.users)
        )

    def _convert(self, node: Node, dtype: torch.dtype) -> None:
        """Visit a conversion. One to float16 becomes one to ``target`` for what follows a layer.

        Where ``target`` has all numbers of float16, it does so for all values. A conversion to
        float32 stays: the model asks for more than the dtype around it.
        """
        source: Any = node.args[0]
        lowers = dtype == torch.float16 and (self.exact or node in self.derived)
        if lowers and self._declared(source) in NARROW_DTYPES:
            self._declare(node)
            dtype = self.target
        node.op, node.target, node.args, node.kwargs = "call_method", "to", (source, dtype), {}
        if is_weight(source) and source.op == "placeholder" and node is not self.first:
            self.first.prepend(node)

    def _declared(self, node: Any) -> torch.dtype | None:
        """The dtype that the graph declares for a node."""
        if node in self.declared:
            example = self.declared[node]
            example = example[0] if isinstance(example, (tuple, list)) else example
            return example.dtype
        held = floating(node)
        return None if held is None else held.dtype

    def _declare(self, node: Node) -> None:
        self.declared[node] = node.meta["example_value"]
        node.meta["example_value"] = in_dtype(self.declared[node], self.target)

    def _restore(self, node: Node) -> None:
        """Let a node read all values in the dtypes that the graph declares for them."""
        if asks_for_sizes(node):
            return
        for x in node.all_input_nodes:
            if x in self.declared:
                dtype = self._declared(x)
                assert dtype is not None
                self._replace(node, x, dtype)

    def _replace(self, node: Node, x: Node, dtype: torch.dtype) -> None:
        """Let a node read x in ``dtype``, straight from what x itself is a conversion of."""
        held = value(x)
        if held is None or held.dtype == dtype or not held.dtype.is_floating_point:
            return
        source: Any = x
        while conversion(source) in NARROW_DTYPES and dtype_of(source.args[0]) in NARROW_DTYPES:
            if source in self.pinned or source.args[0] in self.pinned:
                break
            source = source.args[0]
        key = source, dtype
        if dtype_of(source) == dtype:
            self.converted[key] = source
        elif key not in self.converted:
            early = is_weight(source) and source.op == "placeholder"
            with self.graph.inserting_before(self.first) if early else nullcontext():
                self.converted[key] = convert_to(self.graph, source, dtype)
        node.replace_input_with(x, self.converted[key])
