"""The Dynamo backend ``fastdiff``: decides how each graph is compiled."""

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
from fastdiff.compiler.graph.effects import changes_autocast, changes_modes
from fastdiff.compiler.graph.nodes import value
from fastdiff.compiler.graph.regions import open_regions
from fastdiff.compiler.inference import Compiled, fused
from fastdiff.compiler.reasons import Reason, wants_gradients, why_slow
from fastdiff.compiler.report import GraphReport
from fastdiff.compiler.rewrite import composed
from fastdiff.compiler.training import trained

log = logging.getLogger("fastdiff.compiler")
InnerCompiler = Callable[[GraphModule, Sequence[Any]], Compiled]
_warned: set[Reason] = set()  # reasons that this process has logged as a warning

# Modes of torch.compile. On a CPU they all do the same; for CUDA tensors they go to Inductor.
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Options:
    """The options of ``torch.compile(..., mode=..., options={...})``.

    Attributes:
        precision: ``fast``, ``bf16`` for activations in bfloat16, or ``strict`` for direct
            arithmetic alone.
        packed_bytes: bound of the bytes for packed and joined weights; None for no bound.
        drop_weights: whether the model's own weights are freed once they are packed.
        mode: one of ``MODES``.
    """

    precision: str = "fast"
    packed_bytes: int | None = None
    drop_weights: bool = False
    mode: str = "default"

    @classmethod
    def of(cls, given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Options from those of ``torch.compile``; ValueError names what is allowed."""
        given = dict(given or {})
        unknown = set(given) - {"precision", "packed_bytes", "drop_weights"}
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(map(repr, sorted(unknown)))} of the backend fastdiff, "
                "wanted precision, packed_bytes or drop_weights"
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
        if not isinstance(options.drop_weights, bool):
            raise ValueError(f"drop_weights must be True or False, got {options.drop_weights!r}")
        return options


def backend(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile a graph: ``torch.compile(model, backend="fastdiff", options=...)``.

    On a CPU, without gradients in float32, bfloat16 or float16, with gradients in float32 or
    bfloat16, under autocast or not, the graph is fused. On CUDA tensors it gets fastdiff's
    operations and Inductor compiles it. In other dtypes, or in training mode without gradients, it
    gets only operations that have gradients. Otherwise it runs unchanged.

    With gradients every parameter and input may be differentiated, once: a second derivative is an
    error. Algorithms are chosen by the sizes alone, and weights are packed anew at each use.

    float16 is computed in float32, which has kernels on a CPU, and results are converted back.
    Under autocast the graph computes in the dtypes that autocast gives each operation; float16
    among them is computed in float32 too.

    Where the user can put a graph on the fast path (float64, training mode without gradients,
    tensors on several devices), the logger ``fastdiff.compiler`` says so in a warning, once per
    process and reason. All other reasons are logged at level INFO.

    Args:
        gm: the graph that Dynamo made of the model.
        example_inputs: inputs with the sizes and dtypes that later calls will have.
        options: ``precision``: "fast" (Winograd convolutions, the default), "strict" (direct
            arithmetic alone), or "bf16" (what "fast" does, and float32 and float16 are computed
            with activations in bfloat16: statistics, softmax and sums stay in float32, parameters
            and results keep their dtypes; for graphs on a CPU without gradients: with gradients it
            is "fast", and autocast is what computes in bfloat16).
            ``packed_bytes``: how many bytes this graph's packed and joined weights may take besides
            the model's own, spent where they save the most time; None (the default) for a gibibyte,
            and for more where it saves enough time: packed weights as large as the model's own must
            save 8% of the time. ``drop_weights``: True frees the model's own weights, each as soon
            as it is packed. Whatever reads, saves or changes them then raises a RuntimeError that
            says so; the default is False.
        mode: of ``torch.compile``: "default", "reduce-overhead", "max-autotune" or
            "max-autotune-no-cudagraphs". A graph on a CPU is the same in all of them: its
            algorithms are always chosen by measured times, and its operations always run without
            Python between them. A graph on CUDA tensors is compiled by Inductor in that mode.

    Raises:
        ValueError: an option, its value, the mode, or the value of FASTDIFF_PLAN is unknown; or
            ``precision`` is "bf16" and the tensors are on a CUDA device.
    """
    compiled, report = compile_and_report(gm, example_inputs, Options.of(options, mode))
    if report.reason is not None:
        _tell(report.reason)
    last = dynamo.make_room(backend)
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
    """The compiled graph, as ``backend`` returns it, and its report."""
    timings.measured()  # checks FASTDIFF_PLAN
    report = GraphReport()
    return compile_graph(gm, example_inputs, options, report), report


def _tell(reason: Reason) -> None:
    """Log why a graph is not on the fast path: a warning once per process if there is advice."""
    if reason.advice is None or reason in _warned:
        log.info("not on the fast path: %s", reason.text)
        return
    _warned.add(reason)
    log.warning("a model runs without fastdiff's fast path: %s. %s", reason.text, reason.advice)


def compile_graph(
    gm: GraphModule,
    example_inputs: list[Any],
    options: Options,
    report: GraphReport,
    inner: InnerCompiler | None = None,
) -> Compiled:
    """``backend`` with checked options; ``inner`` replaces Inductor in tests."""
    mark_parameters(gm, example_inputs)
    values = _values(gm)
    devices = sorted({v.device.type for v in values})
    if devices != ["cuda"]:  # Inductor opens regions itself, and its code depends on the threads
        switches = changes_modes(gm.graph) or changes_autocast(gm.graph)
        open_regions(gm, wants_gradients(values) or switches)
        values = _values(gm)
        dynamo.set_guards()
    report.gradients = wants_gradients(values)
    report.reason = why_slow(gm, values, devices)
    if report.reason is None and report.gradients:
        return trained(gm, report, precision=options.precision)
    if report.reason is None:
        return fused(
            gm,
            report,
            measured=timings.measured(),
            precision=options.precision,
            packed_bytes=options.packed_bytes,
            drop_weights=options.drop_weights,
        )
    if devices == ["cuda"]:
        if options.precision == "bf16":
            raise ValueError(
                'precision "bf16" is for tensors on a CPU, got a graph of CUDA tensors: convert '
                "the model by model.to(torch.bfloat16)"
            )
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
    """Register the backend where the package is not installed, so that it has no entry point.

    An entry point is registered, not the function: Dynamo registers the function itself when it
    loads the entry point, and refuses a name that is already registered.
    """
    if "fastdiff" not in registry._BACKENDS:
        registry._BACKENDS["fastdiff"] = EntryPoint(
            name="fastdiff", value="fastdiff.compiler:backend", group="torch_dynamo_backends"
        )


register()
