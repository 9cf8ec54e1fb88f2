"""``explain``: a table of what was fused in a model's graphs, and what was not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fastdiff.compiler import dynamo
from fastdiff.compiler.pipeline import Options, compile_and_report
from fastdiff.compiler.report import GraphReport
from fastdiff.compiler.rewrite.emitter import Emitted
from fastdiff.compiler.run.packing import PackedWeight


@dataclass(frozen=True)
class Fused:
    """A row of the table: one fused operation.

    Attributes:
        what: names of the operations that it computes.
        dtype: of its input and its result: what it computes in, though its sums are float32.
        shape: sizes of its weight and of the inputs that it has had.
        algorithm: the algorithm for each of these inputs.
        packed_bytes: memory of its packed weights that no row above counts.
    """

    what: str
    dtype: str
    shape: str
    algorithm: str
    packed_bytes: int


@dataclass(frozen=True)
class Explanation:
    """The result of ``explain``; ``str()`` of it is a table.

    Attributes:
        graphs: number of graphs that Dynamo made.
        breaks: the reason of each graph break.
        reasons: for each graph that is not on the fast path, why it is not.
        fused: the fused operations.
        left: count of the other nodes by (operation, reason).
        composed: number of calls of ``fastdiff.ops`` that were inserted besides the fused
            operations, such as ``group_norm_silu``.
        uncompiled: why the model, or some calls of it, run without any graph.
        gradients: whether a graph is one with gradients.
        sampling: the result of the same call under ``torch.no_grad()``, where the model was called
            with gradients; else None.
    """

    graphs: int
    breaks: tuple[str, ...]
    reasons: tuple[str, ...]
    fused: tuple[Fused, ...]
    left: dict[tuple[str, str], int]
    composed: int
    uncompiled: tuple[str, ...] = ()
    gradients: bool = False
    sampling: Explanation | None = None

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weights of all fused operations."""
        return sum(row.packed_bytes for row in self.fused)

    def __str__(self) -> str:
        lines = [f"graphs: {self.graphs}, breaks: {len(self.breaks)}"]
        lines += [f"runs uncompiled: {reason}" for reason in self.uncompiled]
        lines += [f"  break: {reason}" for reason in self.breaks]
        lines += [f"not on the fast path: {reason}" for reason in self.reasons]
        rows = [("fused", "dtype", "shape", "algorithm", "packed")]
        rows += [
            (r.what, r.dtype, r.shape, r.algorithm, _mebibytes(r.packed_bytes)) for r in self.fused
        ]
        lines += _table(rows)
        lines += _table(
            [("left", "count", "why")]
            + [(name, str(n), why) for (name, why), n in sorted(self.left.items())]
        )
        lines.append(
            f"{len(self.fused)} fused, {self.composed} of fastdiff.ops, "
            f"{sum(self.left.values())} left, {_mebibytes(self.packed_bytes)} packed"
        )
        if self.sampling is not None:
            lines = ["called with gradients, as in training:", *_indented(lines)]
            lines += ["called under torch.no_grad(), as in sampling:"]
            lines += _indented(str(self.sampling).split("\n"))
        return "\n".join(lines)


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Explanation:
    """Compile a model anew, run it once on ``inputs``, and report what was fused and what was not.

    Where gradients are enabled and something in the model requires them, the model is run a second
    time under ``torch.no_grad()``, as samplers call it: ``Explanation.sampling``.

    Args:
        model: a module or function, compiled already or not. Its existing graphs are kept.
        inputs: positional arguments of the model.
        options: as for ``torch.compile``.
        dynamic: as for ``torch.compile``.
        kwargs: keyword arguments of the model.
    """
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "_torchdynamo_orig_callable", model)
    full = dynamo.functions_at_limit(model)
    if isinstance(model, nn.Module) and model._compiled_call_impl is not None:
        model = copy.copy(model)  # has the same parameters, but is not compiled in place
    call = partial(_explain, model, inputs, kwargs, options, dynamic, full)
    explanation = call()
    if not explanation.gradients:
        return explanation
    with torch.no_grad():
        return replace(explanation, sampling=call())


def _explain(
    model: Callable[..., Any],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: dict[str, Any] | None,
    dynamic: bool | None,
    full: Sequence[str],
) -> Explanation:
    chosen = Options.of(options)
    reports: list[GraphReport] = []
    failures: list[str] = []

    def reporting(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        try:
            compiled, report = compile_and_report(gm, example_inputs, chosen)
        except Exception as error:
            failures.append(f"the backend failed ({error!r}), and Dynamo suppresses its errors")
            raise
        reports.append(report)
        return compiled

    counters = torch._dynamo.utils.counters
    before = {kind: Counter(counters[kind]) for kind in ("graph_break", "unimplemented")}
    isolation = dynamo.isolation_options()
    compiled = torch.compile(model, backend=reporting, dynamic=dynamic, **isolation)
    compiled(*inputs, **kwargs)
    breaks, skipped = (counters[kind] - before[kind] for kind in before)
    left: Counter[tuple[str, str]] = Counter()
    counted: set[tuple[PackedWeight, str]] = set()
    for report in reports:
        left.update(report.left)
    limit = torch._dynamo.config.recompile_limit
    uncompiled = [
        f"{name} graphs, and torch._dynamo.config.recompile_limit is {limit}: calls that none of "
        "them serves run as they are. Raise the limit before the model is compiled, or call "
        "torch.compiler.reset()"
        for name in full
    ]
    uncompiled += failures
    if not reports and not failures:
        uncompiled += [reason.split("\n")[0] for reason in skipped]
        uncompiled += dynamo.why_off()
        if not uncompiled:
            uncompiled = ['Dynamo made no graph; TORCH_LOGS="graph_breaks,recompiles" shows why']
    return Explanation(
        graphs=len(reports),
        breaks=tuple(breaks.elements()),
        reasons=tuple(report.reason.text for report in reports if report.reason is not None),
        fused=tuple(_row(e, counted) for report in reports for e in report.emitted),
        left=dict(left),
        composed=sum(report.composed for report in reports),
        uncompiled=tuple(uncompiled),
        gradients=any(report.gradients for report in reports),
    )


def _row(emitted: Emitted, counted: set[tuple[PackedWeight, str]]) -> Fused:
    plans = getattr(emitted.call, "plans", {})
    sizes = [*([emitted.weight_size] if emitted.weight_size else []), *(key[0] for key in plans)]
    reference = emitted.call.last_weight
    packed = None if reference is None else reference()
    size = 0
    if packed is not None:
        for name, used in packed.memory().items():
            # Count only this call's algorithms: other graphs may have packed the weight for others.
            if name in ("copy", *plans.values()) and (packed, name) not in counted:
                counted.add((packed, name))
                size += used
    return Fused(
        emitted.what,
        str(emitted.dtype).removeprefix("torch."),
        " on ".join("x".join(map(str, size)) for size in sizes),
        ", ".join(dict.fromkeys(plans.values())) or "streamed",
        size,
    )
