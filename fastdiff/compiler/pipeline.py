"""The Dynamo backend ``fastdiff``: which way a graph goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends import registry
from torch.fx import GraphModule

from fastdiff.compiler import dynamo
from fastdiff.compiler.choose import timings
from fastdiff.compiler.choose.algorithms import PRECISIONS
from fastdiff.compiler.graph.canonical import mark_parameters
from fastdiff.compiler.graph.effects import changes_modes
from fastdiff.compiler.graph.nodes import value
from fastdiff.compiler.graph.regions import open_regions
from fastdiff.compiler.inference import Compiled, fused
from fastdiff.compiler.reasons import Reason, wants_gradients, why_slow
from fastdiff.compiler.report import GraphReport
from fastdiff.compiler.rewrite import composed

log = logging.getLogger("fastdiff.compiler")
InnerCompiler = Callable[[GraphModule, Sequence[Any]], Compiled]
_told: set[Reason] = set()  # of which a warning has been given in this process


# Modes of torch.compile. On a CPU they are all the same; on CUDA tensors Inductor is given them.
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., mode=..., options={...})`` may say.

    Attributes:
        precision: ``fast``, or ``strict`` for direct arithmetic alone.
        packed_bytes: bound of the memory for packed and joined weights; None for any.
        mode: one of ``MODES``.
    """

    precision: str = "fast"
    packed_bytes: int | None = None
    mode: str = "default"

    @classmethod
    def of(cls, given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Checked; ValueError names what is allowed."""
        given = dict(given or {})
        unknown = set(given) - {"precision", "packed_bytes"}
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(map(repr, sorted(unknown)))} of the backend fastdiff, "
                "wanted precision or packed_bytes"
            )
        options = cls(**given, mode="default" if mode is None else mode)
        if options.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if options.precision not in tuple(PRECISIONS):
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {options.precision!r}"
            )
        size = options.packed_bytes
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
            raise ValueError(f"packed_bytes must be None or a whole number from 0, got {size!r}")
        return options


def backend(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile a graph: ``torch.compile(model, backend="fastdiff", options=...)``.

    Without gradients on a CPU, in float32 or bfloat16, the graph is fused. On CUDA tensors it gets
    fastdiff's operations and Inductor compiles it. With gradients, or where it draws random
    numbers, it keeps to operations that have gradients. Else it runs as it is.

    A graph that runs as it is for no good reason (float16 on a CPU, autocast, training mode without
    gradients, tensors on several devices) is told of by the logger ``fastdiff.compiler``, as a
    warning, once in a process for each reason; every other one is told of at level INFO.

    Args:
        gm: what Dynamo made of the model.
        example_inputs: of the same sizes and kinds as all that it will be called with.
        options: ``precision``: "fast" (Winograd convolutions, the default) or "strict" (direct
            arithmetic alone). ``packed_bytes``: how much memory the weights that this graph packs
            or joins may take besides the model's own, spent where it saves the most time; None (the
            default) for as much as is useful.
        mode: of ``torch.compile``: "default", "reduce-overhead", "max-autotune" or
            "max-autotune-no-cudagraphs". A graph on a CPU is the same in all of them: its
            algorithms are always chosen by the clock, and Python is always taken out from between
            its operations. One on CUDA tensors is compiled by Inductor in that mode.

    Raises:
        ValueError: an option or the mode is unknown, or a value of an option or of FASTDIFF_PLAN.
    """
    compiled, report = compile_and_report(gm, example_inputs, Options.of(options, mode))
    if report.reason is not None:
        _tell(report.reason)
    last = dynamo.is_last_graph()
    if last is not None:
        log.warning(
            "%s has now as many graphs as torch._dynamo.config.recompile_limit allows (%d). A call "
            "that none of them serves will run uncompiled, and all such calls from then on. Raise "
            "the limit, or call torch.compiler.reset() where a model is no longer needed. "
            'TORCH_LOGS="recompiles" shows why there are so many.',
            last,
            torch._dynamo.config.recompile_limit,
        )
    return compiled


def compile_and_report(
    gm: GraphModule, example_inputs: list[Any], options: Options
) -> tuple[Compiled, GraphReport]:
    """What ``backend`` gives, and what became of the graph."""
    timings.measured()  # raises
    report = GraphReport()
    return compile_graph(gm, example_inputs, options, report), report


def _tell(reason: Reason) -> None:
    """Say that a graph is not on the fast path; a warning once in a process."""
    if reason.advice is None or reason in _told:
        log.info("not on the fast path: %s", reason.text)
        return
    _told.add(reason)
    log.warning("a model runs without fastdiff's fast path: %s. %s", reason.text, reason.advice)


def compile_graph(
    gm: GraphModule,
    example_inputs: list[Any],
    options: Options,
    report: GraphReport,
    inner: InnerCompiler | None = None,
) -> Compiled:
    """``backend`` with checked options; ``inner`` stands for Inductor."""
    mark_parameters(gm, example_inputs)
    values = _values(gm)
    devices = sorted({v.device.type for v in values})
    if devices != ["cuda"]:  # Inductor has its own way with regions, and its code is for threads
        open_regions(gm, wants_gradients(values) or changes_modes(gm.graph))
        values = _values(gm)
        dynamo.set_guards()
    report.reason = why_slow(gm, values, devices)
    if report.reason is None:
        return fused(
            gm,
            report,
            measured=timings.measured(),
            precision=options.precision,
            packed_bytes=options.packed_bytes,
        )
    if devices == ["cuda"]:
        report.composed = composed.gpu(gm)
        report.leave(gm.graph)
        gm.recompile()
        return (inner or partial(_inductor, options.mode))(gm, example_inputs)
    if not report.reason.untouched:
        report.composed = composed.training(gm)
    report.leave(gm.graph)
    gm.recompile()
    return gm.forward


def _values(gm: GraphModule) -> list[Tensor]:
    return [v for n in gm.graph.nodes if (v := value(n)) is not None]


def _inductor(mode: str, gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode)
    return compile_fx(gm, list(example_inputs), config_patches=patches)  # type: ignore[return-value]


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
