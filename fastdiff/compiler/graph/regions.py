"""The graphs within a graph: regions of a model that Dynamo hands over as an operation's argument.

The operations of ``torch.utils.checkpoint`` and ``torch.compiler.nested_compile_region`` are meant
for a compiler that traces through them. Run as they are, the former draws other random numbers when
it computes its region again, and the latter cannot be differentiated.
"""

from __future__ import annotations

from typing import Any

from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.checkpoint import checkpoint

from fastdiff.compiler.graph.nodes import attribute, op

# The number of arguments of an operation before those that its region takes.
_REGIONS = {tag_activation_checkpoint: 1, invoke_subgraph: 2}


def open_regions(gm: GraphModule, gradients: bool) -> None:
    """Put the operations of regions in their places, in ``gm`` and the regions themselves.

    A region of ``torch.compiler.nested_compile_region`` is nothing but its operations, and so is
    a checkpointed one without gradients. With gradients the latter becomes ``recomputed``.

    Args:
        gm: rewritten in place.
        gradients: whether anything in it may be differentiated.
    """
    for node in list(gm.graph.nodes):
        region = _region(node)
        if region is None:
            continue
        open_regions(region, gradients)
        if node.target is tag_activation_checkpoint and gradients:
            node.target = recomputed
        else:
            _inline(gm, node, region)
    gm.recompile()


def recomputed(region: GraphModule, *args: Any, **options: Any) -> Any:
    """Checkpoint a region as eager mode does: random numbers are the same when it is recomputed.

    PyTorch's own operation leaves it to Inductor that they are.

    Args:
        region: what is computed now, and once more for its gradients.
        args: its arguments.
        options: what the model gave ``torch.utils.checkpoint.checkpoint``. The form that is not
            reentrant is taken always: parameters are arguments of the region here, and their
            gradients the same in both.
    """
    options["use_reentrant"] = False
    context = region.meta.get("_checkpoint_context_fn")  # where Dynamo leaves this one
    if context is not None:
        options["context_fn"] = context
    return checkpoint(region, *args, **options)


def _region(node: Node) -> GraphModule | None:
    """What a node calls, where this module knows how to call it."""
    if node.op != "call_function" or node.target not in _REGIONS:
        return None
    source = node.args[0]
    found = attribute(source) if isinstance(source, Node) and source.op == "get_attr" else None
    return found if isinstance(found, GraphModule) else None


def _inline(gm: GraphModule, node: Node, region: GraphModule) -> None:
    given = iter(node.args[_REGIONS[node.target] :])  # type: ignore[index]
    here: dict[Node, Any] = {}
    result: Any = None
    with gm.graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op == "placeholder":
                here[inner] = next(given)
            elif inner.op == "output":
                result = map_arg(inner.args[0], here.__getitem__)
            else:
                new = here[inner] = gm.graph.node_copy(inner, here.__getitem__)
                if inner.op in ("get_attr", "call_module"):
                    new.target = f"{node.args[0].target}.{inner.target}"  # type: ignore[union-attr]
    for user in list(node.users):
        if isinstance(result, (tuple, list)) and op(user) == "getitem":
            _replace(user, result[user.args[1]])  # type: ignore[index]
            gm.graph.erase_node(user)
    _replace(node, result)
    gm.graph.erase_node(node)


def _replace(node: Node, result: Any) -> None:
    """Show all who read a node another value, which need not be a node."""
    for user in list(node.users):
        user.args, user.kwargs = map_arg(
            (user.args, user.kwargs), lambda source: result if source is node else source
        )
