"""The audit's tables: as text, as Markdown, as rows for the documentation, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from tools.audit.measured import Measured
from tools.audit.traffic import Traffic

_KERNELS = (
    "operation", "kernel", "language", "cases", "threads", "registers", "shared", "spilled",
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
    least = min(group, key=lambda one: (one.occupancy, -one.registers))
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
    """The kernels and the bytes, as two tables, without one that has no rows: see ``rows``."""
    both = rows(found, traffic, every)
    return "\n\n".join(_table(head, body, markdown) for head, *body in both if body)


def rows(
    found: Sequence[Measured], traffic: Sequence[Traffic], every: bool = False
) -> tuple[list[Sequence[str]], list[Sequence[str]]]:
    """The kernels and the bytes, as rows of two tables, the heads first.

    ``every`` is a row for each kernel, configuration and architecture, and for each case; else a
    kernel has one row, in which architectures stand side by side, and each operation one of bytes,
    the case that moves most over its least.
    """
    groups: dict[Any, list[Measured]] = {}
    for one in found if every else worst(found):
        row = (one.language, one.operation, one.kernel, *([one] if every else []))
        groups.setdefault(row, []).append(one)
    moved: dict[Any, Traffic] = {}
    for case in traffic:
        row = (case.language, case.operation, *([case.case] if every else []))
        moved[row] = max(moved.get(row, case), case, key=lambda one: one.moved / one.least)
    kernels = [_kernel_row(group, every) for group in groups.values()]
    return [_head(found), *kernels], [_BYTES, *map(_bytes_row, moved.values())]


def _head(found: Sequence[Measured]) -> Sequence[str]:
    archs = "/".join(map(str, sorted({one.arch for one in found})))
    return [f"{name}, sm_{archs}" if name == "registers" else name for name in _KERNELS]


def _kernel_row(group: Sequence[Measured], every: bool) -> Sequence[str]:
    """A kernel's numbers, one of each architecture or the worst of them."""
    one = min(group, key=lambda one: one.occupancy)
    spilled = max(group, key=lambda one: (one.stack, one.spills))
    return (
        one.operation,
        one.kernel.lstrip("_"),
        one.language,
        f"sm_{one.arch} {one.configuration}" if every else str(sum(one.cases for one in group)),
        str(one.threads),
        _each(group, lambda one: str(one.registers)),
        f"{one.shared:,}",
        f"{spilled.spills} accesses"
        if spilled.spills and not spilled.stack
        else f"{spilled.stack}",
        str(min(one.load for one in group) or "-"),
        str(min(one.store for one in group) or "-"),
        _each(group, lambda one: f"{one.occupancy:.0%}"),
    )


def _each(group: Sequence[Measured], text: Callable[[Measured], str]) -> str:
    return "/".join(text(one) for one in sorted(group, key=lambda one: one.arch))


def _bytes_row(one: Traffic) -> Sequence[str]:
    numbers = (one.read, one.written, one.moved, one.least)
    sizes = [f"{value / one.unit:.2f} S" for value in numbers]
    return (one.operation, one.case, one.language, str(one.launches), *sizes)


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
