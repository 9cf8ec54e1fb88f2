"""Compare fastdiff with its peers: in turns, in one process, after a warm-up, by medians.

``pytest benchmarks --benchmark-only`` prints pytest-benchmark's table of fastdiff's times, and
below it one line per comparison. With ``--figures FOLDER`` all figures go to operations.json in
that folder, and from benchmarks/results into the documentation's tables. Every peer gets the same
inputs, layout, dtype and threads, and is timed only after its result agrees with fastdiff's. Freed
memory stays with the process: otherwise the system's fresh pages, whose cost varies from call to
call, would cost more than the measured operation.
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

SECONDS = 1.5  # approximate duration of one comparison
OURS = "fastdiff"
ROUNDS = (9, 400)  # least and largest number of rounds

_done: list[Comparison] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, metavar="FOLDER", help="keep all figures there")


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """versus(ours, peers={name: call}) times the calls in turns, for a line of the summary."""

    def compare(
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        *,
        seconds: float = SECONDS,
        notes: Callable[[Comparison], dict[str, str]] = lambda comparison: {},
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
        made = Comparison.of(request.node, medians.pop(OURS), medians)
        made.notes = notes(made)
        benchmark.extra_info.update({name: t / made.ours for name, t in made.peers.items()})
        _done.append(made)

    return compare


@pytest.fixture(scope="session", autouse=True)
def _keep_freed_memory() -> None:
    machine.keep_heap()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _done:
        return
    facts = ", ".join(f"{key} {value}" for key, value in describe().items())
    terminalreporter.section(f"ours, then each peer and its time over ours ({facts})")
    for comparison in _done:
        terminalreporter.line(comparison.line())
    folder = config.getoption("figures")
    if folder:
        save(_done, folder / "operations.json")
        tables.publish(folder)
