"""Honest comparisons: ours and its peers in turns, in one process, warmed up, medians, ratios.

``pytest benchmarks --benchmark-only`` prints pytest-benchmark's table of our own times and, below,
one line a comparison; with ``--figures FOLDER`` all figures go to operations.json in that folder,
and from benchmarks/results into the documentation's tables. Every peer gets the same inputs,
layout, dtype and threads, and nothing is timed before its result agrees with ours. The heap keeps
what is freed: otherwise fresh pages from the kernel, which differ from call to call, cost more than
what is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparison import Comparison, save

from benchmarks import machine, tables
from fastdiff.ops.backend import describe

SECONDS = 1.5  # that one comparison may take, roughly
OURS = "fastdiff"
ROUNDS = (9, 400)  # at least and at most

_done: list[Comparison] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, metavar="FOLDER", help="keep all figures there")


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """versus(ours, peers={name: call}) times them in turns, for a line of the summary."""

    def compare(
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        *,
        seconds: float = SECONDS,
        notes: Callable[[Comparison], dict[str, str]] = lambda found: {},
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
        found = Comparison.of(request.node, medians.pop(OURS), medians)
        found.notes = notes(found)
        benchmark.extra_info.update({name: t / found.ours for name, t in found.peers.items()})
        _done.append(found)

    return compare


@pytest.fixture(scope="session", autouse=True)
def _keep_freed_memory() -> None:
    machine.keep_heap()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _done:
        return
    facts = ", ".join(f"{key} {value}" for key, value in describe().items())
    terminalreporter.section(f"ours, then each peer and its time over ours ({facts})")
    for found in _done:
        terminalreporter.line(found.line())
    folder = config.getoption("figures")
    if folder:
        save(_done, folder / "operations.json")
        tables.publish(folder)
