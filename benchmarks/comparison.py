"""Shared by the benchmarks of operations: cases, a comparison's figures, the reference as a peer.

``operations.json`` holds the figures of all saved comparisons. Each has the entries

    benchmark, part, case   bench_<benchmark>.py, its function bench_<part>, the other parameters
    shape, dtype, layout    the parameters of these names, "" if the benchmark has none
    ours, peers             median seconds of fastdiff, and of each peer by its name
    notes                   other results, by their names
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from benchmarks import machine
from benchmarks.rows import time_text

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def every_shape(*shapes: tuple[int, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", shapes, ids=["x".join(map(str, s)) for s in shapes])


@dataclass
class Comparison:
    """Median seconds of fastdiff and of each peer, and other results of a benchmark.

    Attributes:
        key: the entries of operations.json that identify the comparison, ``benchmark`` to
            ``layout``.
        ours, peers, notes: the entries of these names in operations.json.
    """

    key: dict[str, str]
    ours: float
    peers: dict[str, float]
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, node: pytest.Item, ours: float, peers: dict[str, float]) -> Comparison:
        """The comparison made by a benchmark's function with its parameters."""
        given = dict(node.callspec.params) if hasattr(node, "callspec") else {}
        case = node.callspec.id if given else ""
        key = {
            "benchmark": node.path.stem.removeprefix("bench_"),
            "part": node.originalname.removeprefix("bench_"),
        }
        if key["part"] == key["benchmark"]:
            key["part"] = ""
        known = {"dtype": DTYPES, "layout": LAYOUTS}
        for name in ("shape", "dtype", "layout"):
            key[name] = ""
            if name == "shape" and name in given:
                written, key[name] = (
                    "x".join(map(str, given[name])),
                    ", ".join(map(str, given[name])),
                )
            elif name in given:
                key[name] = written = {v: k for k, v in known[name].items()}[given[name]]
            else:
                continue
            parts = case.split("-")
            parts.remove(written)
            case = "-".join(parts)
        return cls({**key, "case": case}, ours, peers)

    def line(self) -> str:
        """The figures for a terminal."""
        name = " ".join(filter(None, self.key.values()))
        parts = [f"{name:<52} {time_text(self.ours):>9}"]
        parts += [f"{who} {time_text(t)} = {t / self.ours:.2f}x" for who, t in self.peers.items()]
        return "  ".join([*parts, *(f"{name}: {text}" for name, text in self.notes.items())])


def save(made: list[Comparison], path: Path) -> None:
    """Put comparisons into operations.json; they replace earlier comparisons of the same key."""
    results: dict[str, Any] = {"machines": [], "comparisons": []}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    keys = [one.key for one in made]
    kept = [old for old in results["comparisons"] if {k: old[k] for k in keys[0]} not in keys]
    new = [{**one.key, "ours": one.ours, "peers": one.peers, "notes": one.notes} for one in made]
    machines = machine.with_this_one(results["machines"] if kept else [], torch.get_num_threads())
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machines": machines, "comparisons": [*kept, *new]}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def on_reference(call: Callable[[], Any]) -> Callable[[], Any]:
    """A function that makes the same call on the reference backend, plain PyTorch."""

    def run() -> Any:
        with fastdiff.backend("reference"):
            return call()

    return run
