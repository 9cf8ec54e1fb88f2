"""Honest comparisons: ours and its peers in turns, in one process, warmed up, medians, ratios.

``pytest benchmarks --benchmark-only`` prints pytest-benchmark's table of our own times and, below,
one line a comparison. Every peer gets the same inputs, layout, dtype and threads, and nothing is
timed before its result agrees with ours. The heap keeps what is freed, as PyTorch's users are
advised to arrange: otherwise fresh pages from the kernel, which differ from call to call, cost more
than what is measured (and whoever allocates less would gain by it, which is us).
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.backend import describe

SECONDS = 1.5  # that one comparison may take, roughly
OURS = "fastdiff"
ROUNDS = (9, 400)  # at least and at most
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


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


_done: list[Comparison] = []


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Comparison]:
    """versus(ours, peers={name: call}) times them in turns and returns their medians."""

    def compare(
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        *,
        seconds: float = SECONDS,
        notes: Callable[[Comparison], list[str]] = lambda found: [],
    ) -> Comparison:
        calls = {OURS: ours, **peers}
        times: dict[str, list[float]] = {name: [] for name in calls}

        def turn(*names: str) -> None:
            for name in names:
                start = time.perf_counter()
                calls[name]()
                times[name].append(time.perf_counter() - start)

        for _ in range(4):  # warm-up: caches, allocator, thread pool, lazy initialisation
            turn(*calls)
        rounds = int(seconds / sum(taken[-1] for taken in times.values()))
        rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
        for taken in times.values():
            taken.clear()
        benchmark.pedantic(turn, args=(OURS,), setup=lambda: turn(*peers), rounds=rounds)
        if benchmark.disabled:
            return Comparison(request.node.name, 1.0, dict.fromkeys(peers, 1.0))
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        found = Comparison(
            f"{request.path.stem} {request.node.name}".replace("bench_", ""),
            medians.pop(OURS),
            medians,
        )
        found.notes = notes(found)
        benchmark.extra_info.update({name: t / found.ours for name, t in found.peers.items()})
        _done.append(found)
        return found

    return compare


@pytest.fixture(scope="session", autouse=True)
def _keep_freed_memory() -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(option, 1 << 30)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    wanted = os.environ.get("FASTDIFF_BENCH_THREADS")
    if wanted:
        torch.set_num_threads(int(wanted))


def on_reference(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call on plain PyTorch."""

    def run() -> Any:
        with fastdiff.backend("reference"):
            return call()

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _done:
        return
    facts = ", ".join(f"{key} {value}" for key, value in describe().items())
    terminalreporter.section(f"ours, then each peer and its time over ours ({facts})")
    for found in _done:
        terminalreporter.line(found.line())


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"
