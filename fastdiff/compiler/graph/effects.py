"""What nodes do besides computing a result: write to tensors, share memory, change modes.

A node whose operation is not known here is assumed to have every effect.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fastdiff.compiler.graph.nodes import is_number, op, value


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations whose result has memory of its own, whatever the strides of their arguments.
FRESH_OPS = _words(
    """
    abs acos adaptive_avg_pool2d add addcmul addmm arange argmax argmin avg_pool1d avg_pool2d
    avg_pool3d baddbmm bmm cat celu clamp clamp_max clamp_min clone concat concatenate conv1d conv2d
    conv3d conv_transpose2d cos cumsum div elu embedding empty empty_like eq erf exp exp2 floordiv
    full full_like ge gelu group_norm gt hardswish hardtanh index_select interpolate layer_norm le
    leaky_relu lerp linalg_vector_norm linear linspace log log1p log_softmax logsigmoid logsumexp lt
    masked_fill matmul max_pool1d max_pool2d maximum mean minimum mish mm mod mul multiply ne neg
    normalize ones ones_like outer pad pow prod reciprocal relu relu6 repeat repeat_interleave
    rms_norm rsqrt rsub scaled_dot_product_attention selu sigmoid sign silu sin softmax softplus
    softsign sqrt square stack std sub sum tanh tril triu true_divide truediv var where zeros
    zeros_like
    """
)
# Operations whose result may be a view of an argument. They accept an argument of any strides.
ALIASING_OPS = _words(
    """
    adjoint bfloat16 chunk contiguous detach double dropout dropout1d dropout2d einsum expand
    expand_as flatten float getitem half movedim narrow permute pixel_shuffle pixel_unshuffle
    reshape reshape_as select split squeeze swapaxes swapdims t tensor_split to transpose type
    type_as unbind unflatten unsqueeze
    """
)
# Operations that return no tensor, or only what does not depend on strides.
_NO_TENSOR_OPS = _words(
    """
    size dim numel item getattr sym_sum _log_api_usage_once ndimension is_floating_point __len__ len
    """
)
_SIZES = _words("shape ndim device")  # attributes that do not depend on a tensor's values
_AUTOCAST_SWITCHES = ("_enter_autocast", "_exit_autocast")
_MODE_SWITCHES = (
    "_set_grad_enabled",
    "_enter_inference_mode",
    "_exit_inference_mode",
    "_saved_tensors_hooks_disable",
    "set_grad_enabled",
    "increment_nesting",
)  # fmt: skip - increment_nesting begins vmap and other transforms of torch.func
_OUT_OF_PLACE: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div,
}  # fmt: skip
# Operations that write into their first argument, and those that return the same as a new tensor.
_IN_PLACE_OPS = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "add_": "add",
    "sub_": "sub", "mul_": "mul", "div_": "div",
}  # fmt: skip


def function_of(node: Node) -> Any:
    """What a node calls; where that only calls another function in some mode, that function."""
    return getattr(node.target, "stands_for", node.target)


def name_of(node: Node) -> str | None:
    """The name of an operation of PyTorch or Python; None for any other operation."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return None
    target = function_of(node)
    module = getattr(target, "__module__", None) or ""
    home = module.split(".")[0]
    if module.startswith("torch._ops") or module.startswith("torch.ops"):
        return None
    if home in ("torch", "_operator", "operator", "builtins", "math", ""):
        return str(getattr(target, "__name__", ""))
    return None


def is_known(node: Node) -> bool:
    """Whether the node only computes a result from its arguments' values."""
    name = name_of(node)
    listed = name in FRESH_OPS or name in ALIASING_OPS or name in _NO_TENSOR_OPS
    return listed or op(node) == "view"


def is_fresh(node: Node) -> bool:
    """Whether the node's result has memory of its own."""
    return name_of(node) in FRESH_OPS and not written(node)


def functional_argument(node: Node, name: str, index: int, default: Any) -> Any:
    """An argument of a function of torch.nn.functional, by its name and its position."""
    return node.kwargs.get(name, node.args[index] if index < len(node.args) else default)


def is_active_dropout(node: Node) -> bool:
    """Whether a node sets random elements of its input to zero, as dropout does in training."""
    name = name_of(node) or ""
    if "dropout" not in name:
        return False
    if name.startswith(("alpha", "feature")) or node.op != "call_function":
        return True
    p = functional_argument(node, "p", 1, 0.5)
    training = functional_argument(node, "training", 2, True)
    return training is not False and not (is_number(p) and p == 0)


def is_random(node: Node) -> bool:
    """Whether a node for which ``is_known`` holds advances the random number generator."""
    if name_of(node) == "scaled_dot_product_attention":
        p = functional_argument(node, "dropout_p", 4, 0.0)
        return not (is_number(p) and p == 0)
    return is_active_dropout(node)


def asks_for_sizes(node: Node) -> bool:
    """Whether a node reads no values of its arguments, only their sizes or their device."""
    name = name_of(node)
    if name == "getattr":
        return node.args[1] in _SIZES
    return name in _NO_TENSOR_OPS and name != "item"


def changes_modes(graph: Graph) -> bool:
    """Whether nodes switch gradients, vmap or the like on or off; autocast does not count."""
    return _calls_any(graph, _MODE_SWITCHES)


def changes_autocast(graph: Graph) -> bool:
    """Whether nodes switch autocast on or off."""
    return _calls_any(graph, _AUTOCAST_SWITCHES)


def _calls_any(graph: Graph, names: Sequence[str]) -> bool:
    return any(
        any(name in str(getattr(node.target, "__name__", node.target)) for name in names)
        for node in graph.nodes
        if node.op == "call_function"
    )


def _bound_argument(node: Node, name: str) -> Any:
    """An argument by its name; None where it is not passed or the signature is not known."""
    if name in node.kwargs:
        return node.kwargs[name]
    try:
        bound = inspect.signature(function_of(node)).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    return bound.arguments.get(name)


def written(node: Node) -> list[Node]:
    """The tensors that a node may write to."""
    if node.op == "call_module":
        return list(node.all_input_nodes)
    if node.op not in ("call_function", "call_method"):
        return []
    name = name_of(node)
    if name is None:
        return _written_by_operation(node)
    first = [node.args[0]] if node.args and isinstance(node.args[0], Node) else []
    out = node.kwargs.get("out")
    if out is not None:
        return list(node.all_input_nodes)
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in _IN_PLACE_OPS or name in ("setitem", "__setitem__"):
        return first
    if name == "embedding" and _bound_argument(node, "max_norm") is not None:
        return list(node.all_input_nodes)
    if name in FRESH_OPS or name in ALIASING_OPS:
        return first if _bound_argument(node, "inplace") is True else []
    if name in _NO_TENSOR_OPS:
        return []
    # An operation of PyTorch that is on no list. Batch and instance norm write running statistics.
    return list(node.all_input_nodes) if name in ("batch_norm", "instance_norm") else first * (
        _bound_argument(node, "inplace") is True
    )  # fmt: skip


def _written_by_operation(node: Node) -> list[Node]:
    target = function_of(node)
    schema = getattr(target, "_schema", None)
    if schema is None:
        default = getattr(target, "default", None)
        schema = getattr(default, "_schema", None)
    if schema is None:
        return list(node.all_input_nodes)
    if not schema.is_mutable:
        return []
    return list(node.all_input_nodes)


def functionalise(graph: Graph) -> None:
    """Replace in-place operations by out-of-place ones where the values of the graph stay the same.

    They stay the same where the argument has memory of its own and no view of it exists. All later
    readers of the argument then read the result.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        targets = written(node)
        if len(targets) != 1 or targets[0] is not node.args[0]:
            continue
        x = targets[0]
        before = [user for user in x.users if order[user] < order[node]]
        after = [user for user in x.users if order[user] > order[node]]
        if not is_fresh(x) or not all(is_fresh(user) for user in before):
            continue
        if _make_functional(node):
            for user in after:
                user.replace_input_with(x, node)


def _make_functional(node: Node) -> bool:
    name = name_of(node)
    if name in _IN_PLACE_OPS:
        plain = _IN_PLACE_OPS[name]
        x, other = value(node.args[0]), node.args[1] if len(node.args) == 2 else None
        if x is None or node.kwargs or not _keeps_kind(x, other):
            return False
        node.op = "call_function"
        node.target = _OUT_OF_PLACE[plain]
        return True
    inplace = name in FRESH_OPS and _bound_argument(node, "inplace") is True
    if node.op == "call_function" and inplace:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
        arguments = dict(bound.arguments)
        arguments.pop("inplace")
        first = next(iter(arguments))
        node.args, node.kwargs = (arguments.pop(first),), arguments
        return True
    return False


def _keeps_kind(x: Tensor, other: Any) -> bool:
    """Whether an operation of x and ``other`` gives the dtype and the shape of x."""
    if is_number(other):
        return x.dtype.is_floating_point
    y = value(other)
    return y is not None and y.dtype == x.dtype and y.ndim <= x.ndim


def pinned_nodes(graph: Graph) -> set[Node]:
    """Nodes that read or write memory that the graph writes to; they must stay as they are.

    A node is assumed to share memory with its arguments unless ``is_fresh`` proves otherwise. All
    inputs of the graph but parameters are assumed to share memory with each other.
    """
    parent: dict[Node, Node] = {}

    def find(node: Node) -> Node:
        while parent.setdefault(node, node) is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    marked = [(target, node) for node in graph.nodes for target in written(node)]
    if not marked:
        return set()
    inputs = [n for n in graph.nodes if n.op == "placeholder" and not n.meta["fastdiff_parameter"]]
    for a, b in pairwise(inputs):
        parent[find(a)] = find(b)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or is_fresh(node):
            continue
        if _holds_no_tensor(node):
            continue
        for source in node.all_input_nodes:
            if not _holds_no_tensor(source):
                parent[find(node)] = find(source)
    roots = {find(target) for target, _ in marked}
    shared = [node for node in graph.nodes if find(node) in roots]
    return {*shared, *_readers(shared), *(node for _, node in marked)}


def _holds_no_tensor(node: Node) -> bool:
    """Whether a node's value is known to hold no tensor."""
    return isinstance(
        node.meta.get("example_value"), (int, float, bool, torch.SymInt, torch.SymFloat)
    )


def _readers(nodes: Iterable[Node]) -> set[Node]:
    return {user for node in nodes for user in node.users if user.op != "output"}
