"""What the benchmarks share: their cases, a comparison's figures, and the reference as a peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import fastdiff

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def every_shape(*shapes: tuple[int, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", shapes, ids=["x".join(map(str, s)) for s in shapes])


@dataclass
class Comparison:
    """Medians in seconds of ours and of each peer, and what else is worth a column."""

    name: str
    ours: float
    peers: dict[str, float]
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        parts = [f"{self.name:<52} {_time(self.ours):>9}"]
        parts += [f"{who} {_time(t)} = {t / self.ours:.2f}x" for who, t in self.peers.items()]
        return "  ".join([*parts, *self.notes])


def on_reference(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call on plain PyTorch."""

    def run() -> Any:
        with fastdiff.backend("reference"):
            return call()

    return run


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"
