"""How operations treat dtypes: which multiply matrices, and which compute in any dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from fastdiff.compiler.graph.effects import name_of
from fastdiff.compiler.graph.nodes import argument, conversion, is_weight, op, value

# What autocast converts, and what weights are packed from. It leaves float64 as it is.
NARROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Operations that give the dtype of their inputs and round each result once: they move values,
# combine them one by one, or normalise them by statistics that they compute in float32.
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div"})
_FOLLOWING_OPS = _ELEMENTWISE | {
    "silu", "sigmoid", "dropout", "group_norm", "cat", "pad", "interpolate", "reshape", "view",
    "permute", "transpose", "flatten", "unflatten", "unsqueeze", "clone", "contiguous", "getitem",
}  # fmt: skip
_FOLLOWING_NAMES = frozenset({
    "layer_norm", "gelu", "relu", "relu6", "leaky_relu", "elu", "mish", "hardswish", "tanh", "neg",
    "lerp", "clamp",
    "chunk", "split", "tensor_split", "unbind", "stack", "expand", "expand_as", "squeeze", "select",
    "narrow", "movedim", "repeat", "repeat_interleave", "reshape_as", "pixel_shuffle",
    "pixel_unshuffle", "avg_pool2d", "max_pool2d",
})  # fmt: skip
_LAYERS = frozenset({"conv1d", "conv2d", "linear"})
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "mm", "addmm", "einsum"})


def is_layer(node: Node) -> bool:
    """Whether a node is a convolution or a linear layer."""
    return op(node) in _LAYERS


def is_product(node: Node) -> bool:
    """Whether a node is a layer, an attention, or another product of matrices."""
    return is_layer(node) or op(node) == "attention" or name_of(node) in _PRODUCTS


def is_elementwise(node: Node) -> bool:
    """Whether a node is a sum, difference, product or quotient."""
    return op(node) in _ELEMENTWISE


def is_norm(node: Node) -> bool:
    """Whether a node normalises its first argument; the others are its gain and its offset."""
    return op(node) == "group_norm" or name_of(node) == "layer_norm"


def follows(node: Node) -> bool:
    """Whether a node computes in the dtype of its inputs, whichever that is, as well as it can."""
    if any(isinstance(x, torch.dtype) for x in (*node.args, *node.kwargs.values())):
        return False
    kind = op(node)
    if kind == "interpolate":
        return str(argument(node, "mode", "nearest")).startswith("nearest")
    if kind == "pad":
        return bool(argument(node, "mode", "constant") == "constant")
    return kind in _FOLLOWING_OPS or name_of(node) in _FOLLOWING_NAMES


def floating(node: Any) -> Tensor | None:
    """An example of a node's value, or of its first part; None where it holds no floats."""
    example = value(node)
    if example is None and isinstance(node, Node):
        parts = node.meta.get("example_value")
        if isinstance(parts, (tuple, list)) and parts and isinstance(parts[0], Tensor):
            example = parts[0]
    return example if example is not None and example.dtype.is_floating_point else None


def in_dtype(example: Any, dtype: torch.dtype) -> Any:
    """An example value with its floating-point tensors in ``dtype``, of the same strides."""

    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            return x
        return x.new_empty_strided(x.shape, x.stride(), dtype=dtype)

    return map_aggregate(example, convert)


def parameter_of(node: Any) -> Node | None:
    """The parameter that a node is, or that it converts to another dtype; None for other nodes."""
    if is_weight(node):
        return node
    if not isinstance(node, Node) or conversion(node) not in NARROW_DTYPES:
        return None
    source: Any = node.args[0]
    example = value(source)
    fits = is_weight(source) and example is not None and example.dtype in NARROW_DTYPES
    return source if fits else None
