"""The graphs within a graph: regions of a model that Dynamo hands over as an operation's argument.

The operations of ``torch.utils.checkpoint`` and ``torch.compiler.nested_compile_region`` are meant
for a compiler that traces through them. Run unchanged, the operation of ``checkpoint`` uses other
random numbers when it recomputes its region, and that of ``nested_compile_region`` cannot be
differentiated.
"""

from __future__ import annotations

from typing import Any

from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.checkpoint import checkpoint

from fastdiff.compiler.graph.nodes import attribute, is_weight, op, value

# Operations that call a region, and how many of their arguments come before the region's inputs.
_REGION_OPS = {tag_activation_checkpoint: 1, invoke_subgraph: 2}


def open_regions(gm: GraphModule, gradients: bool) -> None:
    """Inline the regions of ``gm``, and the regions within regions.

    Regions of ``torch.compiler.nested_compile_region`` are always inlined, checkpointed regions
    only without gradients. With gradients a checkpointed region becomes a call of ``recomputed``.

    Args:
        gm: the graph, rewritten in place.
        gradients: whether anything in ``gm`` may be differentiated.
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
    """Checkpoint a region as eager mode does: its recomputation uses the same random numbers.

    PyTorch's own operation relies on Inductor to replay the random numbers.

    Args:
        region: the graph that is computed now, and once more when its gradients are computed.
        args: the region's arguments.
        options: keywords that the model passed to ``torch.utils.checkpoint.checkpoint``.
            ``use_reentrant`` is always set to False: the parameters are arguments of the region
            here, and both forms give them the same gradients.
    """
    options["use_reentrant"] = False
    context = region.meta.get("_checkpoint_context_fn")  # Dynamo moves ``context_fn`` here
    if context is not None:
        options["context_fn"] = context
    return checkpoint(region, *args, **options)


def recomputed_regions(graph: Graph) -> list[GraphModule]:
    """The regions that ``recomputed`` computes, their parameters marked as those of the graph."""
    regions = []
    for node in graph.nodes:
        if node.target is not recomputed:
            continue
        region = attribute(node.args[0])
        inputs = [n for n in region.graph.nodes if n.op == "placeholder"]
        for inner, given in zip(inputs, node.args[1:], strict=True):
            inner.meta.setdefault("example_value", value(given))
            inner.meta["fastdiff_parameter"] = is_weight(given)
        regions.append(region)
    return regions


def _region(node: Node) -> GraphModule | None:
    """The region that a node calls; None where the node calls none."""
    if node.op != "call_function" or node.target not in _REGION_OPS:
        return None
    source = node.args[0]
    region = attribute(source) if isinstance(source, Node) and source.op == "get_attr" else None
    return region if isinstance(region, GraphModule) else None


def _inline(gm: GraphModule, node: Node, region: GraphModule) -> None:
    inputs = iter(node.args[_REGION_OPS[node.target] :])  # type: ignore[index]
    here: dict[Node, Any] = {}
    result: Any = None
    with gm.graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op == "placeholder":
                here[inner] = next(inputs)
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
    """Make all readers of a node read ``result``, which need not be a node."""
    for user in list(node.users):
        user.args, user.kwargs = map_arg(
            (user.args, user.kwargs), lambda source: result if source is node else source
        )
