"""Make a graph under autocast compute the same without autocast: its conversions become nodes.

Dynamo's example values tell what autocast does: a convolution of float32 images and a float32
weight gives bfloat16. So each product of matrices gets its inputs converted to the dtype of its
result, and can then be matched and fused. Operations that compute in the dtype of their inputs stay
as they are. Every other operation keeps an autocast of its own, as autocast converts its inputs by
rules that are PyTorch's.

    conv2d(x, weight, bias)    ->    conv2d(x.to(bf16), weight.to(bf16), bias.to(bf16))
    softmax(x, 1)              ->    under_autocast(softmax)(x, 1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Node

from fastdiff.compiler.graph.dtypes import NARROW_DTYPES, floating, follows, is_product
from fastdiff.compiler.graph.edit import convert_to
from fastdiff.compiler.graph.effects import asks_for_sizes
from fastdiff.compiler.graph.nodes import conversion, dtype_of
from fastdiff.compiler.run.calls import UnderAutocast


@dataclass(frozen=True)
class Autocast:
    """Whether autocast is on for CPU tensors, and its dtype."""

    enabled: bool
    dtype: torch.dtype

    @classmethod
    def around(cls) -> Autocast:
        """The state in which this is called."""
        return cls(torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))

    def without_cache(self) -> torch.autocast:
        """A context of this state that keeps no converted weights after a call."""
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


def make_explicit(gm: GraphModule, around: Autocast) -> None:
    """Rewrite a graph so that it computes without autocast what it computes under ``around``.

    Args:
        gm: the graph; changed in place. Regions in it that switch autocast become plain nodes.
        around: the state in which the caller calls the graph.
    """
    states, switches = [around], []
    for node in list(gm.graph.nodes):
        if node.target is _enter_autocast:
            states.append(_entered(node, states[-1]))
            switches.append(node)
        elif node.target is _exit_autocast:
            states.pop()
            switches.append(node)
        elif states[-1].enabled and node.op in ("call_function", "call_method", "call_module"):
            _explicit(gm, node, states[-1].dtype)
    for node in reversed(switches):
        gm.graph.erase_node(node)


def _entered(node: Node, before: Autocast) -> Autocast:
    """The state within a region that ``node`` enters."""
    device, dtype, enabled, _ = node.args
    if device != "cpu":
        return before
    return Autocast(bool(enabled), before.dtype if dtype is None else dtype)  # type: ignore[arg-type]


def _explicit(gm: GraphModule, node: Node, dtype: torch.dtype) -> None:
    inputs = [x for x in node.all_input_nodes if floating(x) is not None]
    if is_product(node) and dtype_of(node) == dtype:
        with gm.graph.inserting_before(node):
            for x in inputs:
                if dtype_of(x) in NARROW_DTYPES and dtype_of(x) != dtype:
                    node.replace_input_with(x, convert_to(gm.graph, x, dtype))
    elif inputs and not (follows(node) or conversion(node) is not None or asks_for_sizes(node)):
        node.target = UnderAutocast(_function(gm, node), dtype)
        node.op = "call_function"


def _function(gm: GraphModule, node: Node) -> Callable[..., Any]:
    """What a node calls, as a function."""
    if node.op == "call_method":
        return getattr(torch.Tensor, str(node.target))
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))
    return node.target  # type: ignore[return-value]
