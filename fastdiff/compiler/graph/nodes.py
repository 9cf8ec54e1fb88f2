"""Queries on a node of a graph from Dynamo: the name of its operation, its arguments, its value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

_FUNCTIONS: dict[Callable[..., Any], str] = {
    torch.conv1d: "conv1d", F.conv1d: "conv1d", torch.conv2d: "conv2d", F.conv2d: "conv2d",
    torch._C._nn.linear: "linear", F.linear: "linear",
    F.group_norm: "group_norm", torch.group_norm: "group_norm",
    F.silu: "silu", torch._C._nn.silu: "silu", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid",
    F.scaled_dot_product_attention: "attention",
    F.dropout: "dropout", F.dropout1d: "dropout", F.dropout2d: "dropout",
    operator.add: "add", torch.add: "add", operator.sub: "sub", torch.sub: "sub",
    operator.mul: "mul", torch.mul: "mul", torch.multiply: "mul",
    operator.truediv: "div", torch.div: "div", torch.true_divide: "div", torch.divide: "div",
    torch.lerp: "lerp", torch.cat: "cat", torch.concat: "cat", torch.concatenate: "cat",
    torch._C._nn.pad: "pad", F.pad: "pad", F.interpolate: "interpolate",
    torch.reshape: "reshape", torch.permute: "permute", torch.transpose: "transpose",
    torch.swapaxes: "transpose", torch.flatten: "flatten", torch.unflatten: "unflatten",
    torch.unsqueeze: "unsqueeze", torch.clone: "clone", operator.getitem: "getitem",
}  # fmt: skip
_METHODS = {
    **{name: name for name in (
        "add", "sub", "mul", "div", "lerp", "sigmoid", "view", "reshape", "permute", "transpose",
        "flatten", "unflatten", "unsqueeze", "contiguous", "clone",
    )},
    **{name: "to" for name in ("to", "type", "float", "bfloat16", "double", "half", "type_as")},
    "swapaxes": "transpose", "multiply": "mul", "true_divide": "div", "divide": "div",
}  # fmt: skip
_CONVERSIONS = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16,
    "bfloat16": torch.bfloat16,
}  # fmt: skip
# The arguments of each operation in their order. With any other keyword it is not recognised.
_KEYWORDS: dict[str, tuple[str, ...]] = {
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "linear": ("input", "weight", "bias"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
    "attention": (
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ),
    "silu": ("input", "inplace"),
    "sigmoid": ("input",),
    "dropout": ("input", "p", "training", "inplace"),
    "add": ("input", "other"), "sub": ("input", "other"), "mul": ("input", "other"),
    "div": ("input", "other"),
    "lerp": ("input", "end", "weight"),
    "cat": ("tensors", "dim"),
    "pad": ("input", "pad", "mode", "value"),
    "interpolate": (
        "input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor",
        "antialias",
    ),
    "flatten": ("input", "start_dim", "end_dim"),
    "unflatten": ("input", "dim", "sizes"),
    "transpose": ("input", "dim0", "dim1"),
    "unsqueeze": ("input", "dim"),
    "clone": ("input",),
    "contiguous": ("input",),
    "view": ("input", "size"), "reshape": ("input", "shape"), "permute": ("input", "dims"),
    "to": ("input", "dtype", "device"),
}  # fmt: skip


def op(node: Any) -> str | None:
    """The name of a node's operation in this package; None for operations that it does not know."""
    if not isinstance(node, Node):
        return None
    if node.op == "call_function":
        name = _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    elif node.op == "call_method":
        name = _METHODS.get(str(node.target))
    else:
        return None
    if name is not None and any(key not in _KEYWORDS.get(name, ()) for key in node.kwargs):
        return None
    return name


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument of a recognised operation, given by position or by keyword."""
    if name in node.kwargs:
        return node.kwargs[name]
    index = _KEYWORDS[op(node) or ""].index(name)
    return node.args[index] if index < len(node.args) else default


def value(node: Any) -> Tensor | None:
    """An example (fake) tensor of a node's value; None where that is no tensor or is not known."""
    if not isinstance(node, Node):
        return None
    example = node.meta.get("example_value")
    if example is None and node.op == "get_attr":
        example = attribute(node)
    return example if isinstance(example, Tensor) else None


def attribute(node: Node) -> Any:
    """The attribute of the graph's module that a get_attr node reads; None where it has none."""
    owner: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name, None)
    return owner


def is_weight(node: Any) -> bool:
    """Whether a node stays the same between calls, and can be packed.

    It is a parameter, an attribute, or computed from parameters alone (``rewrite.low_rank``).
    """
    if not isinstance(node, Node):
        return False
    if node.op == "get_attr":
        return isinstance(attribute(node), Tensor)
    return bool(node.meta.get("fastdiff_parameter"))


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a node's value."""
    example = value(node)
    return None if example is None else example.dtype


def equal(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, for all input sizes that the graph serves."""
    same = a is b or a == b
    if isinstance(same, bool):
        return same
    # Only symbolic sizes need this module, whose import takes half a second.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(same))


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal."""
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def is_number(x: Any) -> bool:
    """Whether an argument is a Python number."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def is_scalar_node(x: Any) -> bool:
    """Whether a node's value is a Python number (a module's float under dynamic shapes)."""
    if not isinstance(x, Node):
        return False
    return isinstance(x.meta.get("example_value"), (float, int, torch.SymFloat, torch.SymInt))


def pair(x: Any) -> tuple[int, int] | None:
    """An int, or a sequence of one or two ints, as a pair; None for anything else."""
    both = (x, x) if isinstance(x, int) else tuple(x) if isinstance(x, (tuple, list)) else ()
    both = both * 2 if len(both) == 1 else both
    return both if len(both) == 2 and all(isinstance(v, int) for v in both) else None


def conversion(node: Node) -> torch.dtype | None:
    """The dtype that a ``to`` converts to; None where it also changes something else."""
    if op(node) != "to":
        return None
    name = str(node.target)
    if name in _CONVERSIONS and len(node.args) == 1 and not node.kwargs:
        return _CONVERSIONS[name]
    if name == "type_as" and len(node.args) == 2:
        return dtype_of(node.args[1])
    targets = [*node.args[1:], *node.kwargs.values()]
    source, result = value(node.args[0]), value(node)
    if source is None or result is None or result.device != source.device or not targets:
        return None
    if any(isinstance(v, (bool, torch.memory_format)) for v in targets):
        return None
    plain = all(isinstance(v, (torch.dtype, torch.device, Node, str)) for v in targets)
    return result.dtype if plain else None


def inline_modules(gm: GraphModule) -> None:
    """Replace calls of the modules that the matcher knows by the functions that these call.

    Dynamo inlines modules itself unless ``inline_inbuilt_nn_modules`` is off.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        with gm.graph.inserting_before(node):
            new = _functional(gm, node, module)
        if new is not None:
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)


def _functional(gm: GraphModule, node: Node, module: Any) -> Node | None:
    if len(node.args) != 1 or node.kwargs or module._forward_hooks or module._forward_pre_hooks:
        return None
    x, call = node.args[0], gm.graph.call_function

    def get(name: str) -> Node | None:
        if getattr(module, name) is None:
            return None
        return gm.graph.get_attr(f"{node.target}.{name}")

    kind = type(module)
    if kind is nn.Conv2d and module.padding_mode == "zeros":
        sizes = (module.stride, module.padding, module.dilation, module.groups)
        return call(torch.conv2d, (x, get("weight"), get("bias"), *sizes))
    if kind is nn.Linear:
        return call(F.linear, (x, get("weight"), get("bias")))
    if kind is nn.GroupNorm:
        args = (x, module.num_groups, get("weight"), get("bias"), module.eps)
        return call(F.group_norm, args)
    if kind is nn.SiLU:
        return call(F.silu, (x,), {"inplace": module.inplace})
    if kind is nn.Dropout:
        return call(F.dropout, (x, module.p, module.training, module.inplace))
    return None
