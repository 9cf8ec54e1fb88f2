"""The report's Markdown: tables, and those of a breakdown."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import markdown


def number(value: float | None, pattern: str = "{:.1f}") -> str:
    """A figure, or nothing."""
    return "" if value is None else pattern.format(value)


def breakdown_tables(record: dict[str, Any]) -> str:
    """Where a call's time goes: by part, by convolution, and what the rest is made of."""
    whole = record["recorded"]
    parts = sorted(record["parts"].items(), key=lambda item: -item[1])
    rows = [[name, f"{ms:.2f}", f"{ms / whole:.1%}"] for name, ms in parts]
    rows.append(["sum", f"{sum(ms for _, ms in parts):.2f}", ""])
    rows.append(["the call, recorded", f"{whole:.2f}", ""])
    bare = record["unrecorded"]
    rows.append(["the call, not recorded", f"{bare:.2f}", f"{bare / whole:.1%}"])
    peak = record["peak_gflops"]
    shapes = [
        [
            " x ".join(map(str, shape["input"])),
            " x ".join(map(str, shape["weight"])) + _extras(shape),
            shape["algorithm"],
            f"{shape['calls']}",
            f"{shape['milliseconds']:.2f}",
            f"{shape['gflops']:.0f}",
            f"{shape['gflops'] / peak:.0%}",
        ]
        for shape in record["convolutions"]
    ]
    rest = [[f"`{name}`", f"{ms:.2f}"] for name, ms in record["rest"].items()]
    head = ["input", "weight", "algorithm", "calls", "ms", "GFLOP/s", "of peak"]
    return "\n".join(
        [
            f"### Where the time of {record['peer']} goes: batch {record['batch']}, "
            f"{record['dtype']}\n",
            markdown([["part", "ms", "share"], *rows]),
            f"Convolutions and linear layers, GFLOP/s as if computed directly; the peak is "
            f"{peak:.0f} GFLOP/s, a {record['peak_of']}.\n",
            markdown([head, *shapes]),
            *(["The rest:\n", markdown([["operation", "ms"], *rest])] if rest else []),
        ]
    )


def _extras(shape: dict[str, Any]) -> str:
    stride = f", stride {shape['stride'][0]}" if max(shape["stride"]) > 1 else ""
    return stride + (", upsampled" if shape["upsample"] else "")
