"""A breakdown of a U-Net's call as tables."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import markdown
from benchmarks.turns import parts


def breakdown_tables(record: dict[str, Any]) -> str:
    """Where a call's time goes: by part, by convolution, and what the rest is made of."""
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
    head = ["input", "weight", "algorithm", "calls", "ms", "GFLOP/s", "of peak"]
    return "\n".join(
        [
            f"### Where the time of {record['peer']} goes: batch {record['batch']}, "
            f"{record['dtype']}\n",
            parts.parts_table(record),
            f"Convolutions and linear layers, GFLOP/s as if computed directly; the peak is "
            f"{peak:.0f} GFLOP/s, a {record['peak_of']}.\n",
            markdown([head, *shapes]),
            *filter(None, [parts.rest_table(record)]),
        ]
    )


def _extras(shape: dict[str, Any]) -> str:
    stride = f", stride {shape['stride'][0]}" if max(shape["stride"]) > 1 else ""
    return stride + (", upsampled" if shape["upsample"] else "")
