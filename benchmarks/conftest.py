"""Honest comparisons: ours and its peers in turns, in one process, warmed up, medians, ratios.

``pytest benchmarks --benchmark-only`` prints pytest-benchmark's table of our own times and, below,
one line a comparison. Every peer gets the same inputs, layout, dtype and threads, and nothing is
timed before its result agrees with ours. The heap keeps what is freed: otherwise fresh pages
from the kernel, which differ from call to call, cost more than what is measured.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from comparison import Comparison

from fastdiff.ops.backend import describe

SECONDS = 1.5  # that one comparison may take, roughly
OURS = "fastdiff"
ROUNDS = (9, 400)  # at least and at most
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


_done: list[Comparison] = []


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """versus(ours, peers={name: call}) times them in turns, for a line of the summary."""

    def compare(
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        *,
        seconds: float = SECONDS,
        notes: Callable[[Comparison], list[str]] = lambda found: [],
    ) -> None:
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
            return
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        found = Comparison(
            f"{request.path.stem} {request.node.name}".replace("bench_", ""),
            medians.pop(OURS),
            medians,
        )
        found.notes = notes(found)
        benchmark.extra_info.update({name: t / found.ours for name, t in found.peers.items()})
        _done.append(found)

    return compare


@pytest.fixture(scope="session", autouse=True)
def _keep_freed_memory() -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(option, 1 << 30)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _done:
        return
    facts = ", ".join(f"{key} {value}" for key, value in describe().items())
    terminalreporter.section(f"ours, then each peer and its time over ours ({facts})")
    for found in _done:
        terminalreporter.line(found.line())
