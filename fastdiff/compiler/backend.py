"""The Dynamo backend ``fastdiff``: which way a graph goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends import registry
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastdiff import ops
from fastdiff.compiler import composed, report, timings
from fastdiff.compiler.effects import changes_modes, drops, frozen_nodes, given, name_of
from fastdiff.compiler.find import find
from fastdiff.compiler.gated import gated
from fastdiff.compiler.graph import is_weight, value
from fastdiff.compiler.layout import restore_strides
from fastdiff.compiler.normalise import mark_parameters, normalise
from fastdiff.compiler.patterns import DTYPES
from fastdiff.compiler.plan import PRECISIONS
from fastdiff.compiler.regions import open_regions
from fastdiff.compiler.replay import Replay
from fastdiff.compiler.rewrite import Rewriter, remove_unused

log = logging.getLogger("fastdiff.compiler")
Compiled = Callable[..., Any]
InnerCompiler = Callable[[GraphModule, Sequence[Any]], Compiled]


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options={...})`` may say.

    Attributes:
        precision: ``fast``, or ``strict`` for direct arithmetic alone.
        packed_bytes: bound of the memory for packed and joined weights; None for any.
    """

    precision: str = "fast"
    packed_bytes: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """Checked; ValueError names what is allowed."""
        given = dict(given or {})
        unknown = set(given) - {"precision", "packed_bytes"}
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(map(repr, sorted(unknown)))} of the backend fastdiff, "
                "wanted precision or packed_bytes"
            )
        options = cls(**given)
        if options.precision not in tuple(PRECISIONS):
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {options.precision!r}"
            )
        size = options.packed_bytes
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
            raise ValueError(f"packed_bytes must be None or a whole number from 0, got {size!r}")
        return options


def backend(
    gm: GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None
) -> Compiled:
    """Compile a graph: ``torch.compile(model, backend="fastdiff", options=...)``.

    Without gradients on a CPU, in float32 or bfloat16, the graph is fused. On CUDA tensors it gets
    fastdiff's operations and Inductor compiles it. With gradients, or where it draws random
    numbers, it keeps to operations that have gradients. Else it runs as it is.

    Args:
        gm: what Dynamo made of the model.
        example_inputs: of the same sizes and kinds as all that it will be called with.
        options: ``precision``: "fast" (Winograd convolutions, the default) or "strict" (direct
            arithmetic alone). ``packed_bytes``: how much memory the weights that this graph packs
            or joins may take besides the model's own, spent where it saves the most time; None (the
            default) for as much as is useful.

    Raises:
        ValueError: an option is unknown, or a value of one or of FASTDIFF_PLAN.
    """
    chosen = Options.of(options)
    timings.measured()  # raises
    found = report.GraphReport()
    compiled = compile_graph(gm, example_inputs, chosen, found)
    report.record(found)
    if found.reason is not None:
        log.info("not on the fast path: %s", found.reason)
    return compiled


def compile_graph(
    gm: GraphModule,
    example_inputs: list[Any],
    options: Options,
    found: report.GraphReport,
    inner: InnerCompiler | None = None,
) -> Compiled:
    """``backend`` with checked options; ``inner`` stands for Inductor."""
    mark_parameters(gm, example_inputs)
    values = _values(gm)
    devices = sorted({v.device.type for v in values})
    if devices != ["cuda"]:  # Inductor has its own way with regions
        open_regions(gm, _wants_gradients(values) or changes_modes(gm.graph))
        values = _values(gm)
    found.reason = _reason(gm, values, devices)
    if found.reason is None:
        return _fuse(gm, options, found)
    if devices == ["cuda"]:
        found.composed = composed.gpu(gm)
        found.leave(gm.graph)
        gm.recompile()
        return (inner or _inductor)(gm, example_inputs)
    elif devices == ["cpu"] and found.reason not in (AUTOCAST, SUBCLASS):
        found.composed = composed.training(gm)
        found.leave(gm.graph)
    else:
        found.leave(gm.graph)
    gm.recompile()
    return gm.forward


AUTOCAST = "autocast or a change of modes within the graph"
SUBCLASS = "a tensor of a class of its own"


def _values(gm: GraphModule) -> list[Tensor]:
    return [v for n in gm.graph.nodes if (v := value(n)) is not None]


def _wants_gradients(values: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(v.requires_grad for v in values)


def _reason(gm: GraphModule, values: list[Tensor], devices: list[str]) -> str | None:
    """Why a graph cannot take the fast path."""
    if devices != ["cpu"]:
        return f"tensors on {', '.join(devices) or 'no device'}: Inductor compiles CUDA graphs"
    if any(is_traceable_wrapper_subclass(v) for v in values):
        return SUBCLASS
    if torch.is_autocast_enabled("cpu") or changes_modes(gm.graph):
        return AUTOCAST
    if _wants_gradients(values):
        return "gradients are enabled and a tensor requires them"
    if any(isinstance(size, int) and size == 0 for v in values for size in v.shape):
        return "an empty tensor"
    random = next((n for n in gm.graph.nodes if _is_training(n)), None)
    if random is not None:
        return f"training mode: {random.target if random.op == 'call_method' else name_of(random)}"
    floats = {v.dtype for v in values if v.dtype.is_floating_point}
    if not floats & set(DTYPES):
        return f"dtype {', '.join(sorted(str(d) for d in floats))}, wanted float32 or bfloat16"
    return None


def _is_training(node: Node) -> bool:
    norm = name_of(node) in ("batch_norm", "instance_norm")
    return drops(node) or (norm and given(node, "training", 5, False) is True)


def _fuse(gm: GraphModule, options: Options, found: report.GraphReport) -> Compiled:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    remove_unused(gm.graph)
    normalise(gm)
    remove_unused(gm.graph)
    frozen = frozen_nodes(gm.graph)
    gated(gm.graph, frozen)
    matches = find(gm.graph, frozen)
    rewriter = Rewriter(gm, matches, frozen, options.precision, options.packed_bytes)
    found.emitted = rewriter.run()
    found.composed = composed.norms(gm.graph, frozen, alone=True)
    found.composed += sum(node.target is ops.geglu for node in gm.graph.nodes)
    restore_strides(gm.graph, frozen)
    found.leave(gm.graph, frozen)
    gm.graph.lint()
    gm.recompile()
    if not rewriter.weights:
        return gm.forward
    varying = [i for i, node in enumerate(placeholders) if not is_weight(node)]
    return Replay(gm, rewriter.watch, varying)


def _inductor(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs))  # type: ignore[return-value]


def register() -> None:
    """Make the name known where the package's entry point is not (a tree on the path).

    An entry point, not the function: Dynamo registers what it has loaded by one itself, and
    refuses a name that it has.
    """
    if "fastdiff" not in registry._BACKENDS:
        registry._BACKENDS["fastdiff"] = EntryPoint(
            name="fastdiff", value="fastdiff.compiler:backend", group="torch_dynamo_backends"
        )


register()
