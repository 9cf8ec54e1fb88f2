"""The audit's tables: as text, as Markdown for the README, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from fastdiff.kernels.audit.measured import Measured
from fastdiff.kernels.audit.traffic import Traffic

_KERNELS = (
    "operation", "kernel", "language", "arch", "cases", "threads", "registers", "shared", "spilled",
    "load", "store", "occupancy",
)  # fmt: skip
_BYTES = ("operation", "case", "language", "launches", "read", "written", "moved", "least")


def worst(found: Sequence[Measured]) -> list[Measured]:
    """One for each kernel and architecture, each number the worst of its configurations.

    Its threads and shared memory are those of the configuration with the least occupancy, and so
    is its occupancy. In CUDA the widths are those of the widest instance: the others are there for
    tensors that are not aligned.
    """
    groups: dict[str, list[Measured]] = {}
    for one in found:
        groups.setdefault(one.who, []).append(one)
    return [_worst(group) for group in groups.values()]


def _worst(group: list[Measured]) -> Measured:
    least = min(group, key=lambda one: one.occupancy)
    widths = max if least.language == "cuda" else min
    return replace(
        least,
        registers=least.registers,
        stack=max(one.stack for one in group),
        spills=max(one.spills for one in group),
        load=widths((one.load for one in group if one.load), default=0),
        store=widths((one.store for one in group if one.store), default=0),
        cases=len(group),
    )


def tables(
    found: Sequence[Measured], traffic: Sequence[Traffic], every: bool, markdown: bool
) -> str:
    """The kernels and the bytes, as two tables."""
    kernels = [
        (
            one.operation,
            one.kernel.lstrip("_"),
            one.language,
            f"sm_{one.arch}",
            one.configuration if every else str(one.cases),
            str(one.threads),
            str(one.registers),
            f"{one.shared:,}",
            str(one.stack) if one.stack or not one.spills else f"{one.spills} accesses",
            str(one.load or "-"),
            str(one.store or "-"),
            f"{one.occupancy:.0%}",
        )
        for one in (found if every else worst(found))
    ]
    moved = [
        (
            one.operation,
            one.case,
            one.language,
            str(one.launches),
            *(f"{value / one.unit:.2f} S" for value in (one.read, one.written, one.moved)),
            f"{one.least / one.unit:.2f} S",
        )
        for one in traffic
    ]
    parts = [
        _table(head, rows, markdown)
        for head, rows in ((_KERNELS, kernels), (_BYTES, moved))
        if rows
    ]
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    if markdown:
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_json(found: Sequence[Measured], traffic: Sequence[Traffic], problems: Sequence[str]) -> str:
    """Everything that was found, each configuration by itself."""
    kernels = [{**asdict(one), "occupancy": one.occupancy} for one in found]
    return json.dumps(
        {"kernels": kernels, "traffic": [asdict(one) for one in traffic], "problems": problems},
        indent=1,
    )
