"""The order of a run: compute what is expected, prepare and check every peer, then time in turns.

All peers of a run are alive at once, each in its own process; while one is timed the others wait. A
pause before each turn lets the threads of the previous peer go to sleep; the processor time that
waiting processes take nevertheless is measured and reported.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.turns.job import OURS, REFERENCE, Case, Job
from benchmarks.turns.process import Process, Program, WorkerError, idle_share
from benchmarks.turns.worker import SLOW

PAUSE = 0.05  # seconds before a turn; libgomp's threads spin for 5 ms, ONNX Runtime's for 1 ms
SLOW_ROUNDS = 3  # rounds of peers whose call takes longer than ``Run.slow``

Store = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """Options of the command line for every run.

    Attributes:
        rounds: number of turns of each peer.
        limit: longest time for an answer, compilation included, in seconds.
        keep_heap: keep freed memory in the process.
        warm: start every peer again after its first calls, for the time of a first call with the
            caches that an earlier process left.
        breakdown: the peer whose calls are broken down; None for none.
        folder: for the files and logs of the processes.
    """

    rounds: int
    limit: float
    keep_heap: bool
    warm: bool
    breakdown: str | None
    folder: Path


@dataclass
class Row:
    """A peer's figures in one run; times in seconds, memory in MiB.

    Attributes:
        peer: its name.
        failed: the reason why figures are missing, or None.
        times: of each call.
        error, first_call, call, notes: see ``worker.Readiness``.
        warm_first_call: a later process's first call, with the caches that the first one left.
        peak_memory, running_memory: see ``Worker.memory``.
    """

    peer: str
    failed: str | None = None
    times: list[float] = field(default_factory=list)
    error: float | None = None
    first_call: float | None = None
    warm_first_call: float | None = None
    call: float | None = None
    peak_memory: float | None = None
    running_memory: float | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the median of the times."""
        median = statistics.median(self.times) if self.times else None
        return asdict(self) | {"median": median}


def say(text: str) -> None:
    """Print a line of progress on standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Run:
    """One case, all peers.

    Args:
        case: what is timed.
        peers: names.
        settings: options of the command line.
        store: called with the record after every change of it.

    Attributes:
        program: of a peer's process.
        slow: seconds of a call, from which on a peer has ``SLOW_ROUNDS`` turns at most.
        breakdown_calls: number of calls that a breakdown records.
    """

    program: Program
    slow = SLOW
    breakdown_calls = 10

    def __init__(self, case: Case, peers: Sequence[str], settings: Settings, store: Store) -> None:
        self.case, self.settings, self.title = case, settings, case.title
        self.rows = {name: Row(name) for name in peers}
        self.expected = settings.folder / f"{self._expected_by()}.pt"
        self.facts = machine.facts(case.threads if case.size is None else None)
        self._finished = False
        self._store = store
        self._disturbed = [0.0]  # cores that others took, turn by turn

    def run(self) -> None:
        """Everything that was asked for; failures end up in the rows."""
        if self._expect():
            self._run()
        self._finished = True
        self._save()

    def _expected_by(self) -> str:
        """Name of what the expected results depend on, for their file."""
        return self.title.replace(", ", "-").replace(" ", "-")

    def _expect(self) -> bool:
        """Have the expected results written; False if that fails, with the reason in the rows."""
        say(f"{self.title}: what float64 makes of it")
        try:
            if not self.expected.exists():
                self._reference("expect")
        except WorkerError as error:
            say(f"{self.title}: not run: {error}")
            for row in self.rows.values():
                row.failed = f"nothing to check it against: {error}"
            return False
        return True

    def _run(self) -> None:
        alive: dict[str, Process] = {}
        try:
            for name in self.rows:
                process = self._ready(name)
                if process is not None and self.settings.warm:
                    with process:
                        self._ask_memory(self.rows[name], process)
                    process = None if self.rows[name].failed else self._ready(name)
                if process is not None:
                    alive[name] = process
            self._rounds(alive)
            self._afterwards(alive)
        finally:
            for process in alive.values():
                process.close()

    def _afterwards(self, alive: dict[str, Process]) -> None:
        """What is asked of the peers when all are timed."""
        if self.settings.breakdown in alive:
            self._breakdown(alive[self.settings.breakdown], self.settings.breakdown)

    def _job(self, peer: str) -> Job:
        folder = f"{self.title}-{peer}".replace(", ", "-").replace(" ", "-")
        settings = self.settings
        return Job(self.case, peer, settings.folder / folder, self.expected, settings.keep_heap)

    def _process(self, peer: str) -> Process:
        return Process(type(self).program, self._job(peer), self.settings.limit)

    def _reference(self, *request: Any) -> None:
        with self._process(REFERENCE) as process:
            process.ask(*request)

    def _ready(self, name: str) -> Process | None:
        """The process of a peer after its first calls, or None with the reason in its row."""
        row = self.rows[name]
        say(f"{self.title}: {name} gets ready")
        process = self._process(name)
        try:
            readiness = process.ask("prepare")
        except BaseException as error:
            process.close()
            if not isinstance(error, WorkerError):
                raise
            row.failed = str(error)
            say(f"{self.title}: {name} failed: {error}")
            self._save()
            return None
        row.call = readiness.call
        if row.error is None:
            row.error, row.first_call = readiness.error, readiness.first_call
            row.notes = readiness.notes
        elif row.warm_first_call is None:
            row.warm_first_call = readiness.first_call
        say(
            f"{self.title}: {name}: first call {readiness.first_call:.1f} s, "
            f"then {1e3 * readiness.call:.1f} ms, error {readiness.error:.1e}"
        )
        self._save()
        return process

    def _rounds(self, alive: dict[str, Process]) -> None:
        for number in range(self.settings.rounds):
            say(f"{self.title}: round {number + 1} of {self.settings.rounds}")
            for name, process in list(alive.items()):
                row = self.rows[name]
                if (row.call or 0) > self.slow and number >= SLOW_ROUNDS:
                    continue
                self._turn(row, process, [p for p in alive.values() if p is not process])
                if row.failed:
                    alive.pop(name).close()
            self._save()
        for name, process in alive.items():
            self._ask_memory(self.rows[name], process)
        self._save()

    def _turn(self, row: Row, process: Process, others: list[Process]) -> None:
        time.sleep(PAUSE)
        before, start = [other.cpu_seconds() for other in others], time.perf_counter()
        try:
            row.times += process.ask("turn", row.call)
            row.call = statistics.median(row.times)
        except WorkerError as error:
            row.failed = str(error)
            say(f"{self.title}: {row.peer} failed: {error}")
        self._disturbed.append(idle_share(others, before, start))

    def _ask_memory(self, row: Row, process: Process) -> None:
        try:
            whole, running = process.ask("memory")
        except WorkerError as error:
            row.failed = str(error)
            return
        row.peak_memory = max(filter(None, (row.peak_memory, whole)), default=None)
        row.running_memory = max(filter(None, (row.running_memory, running)), default=None)

    def _breakdown(self, process: Process, name: str) -> None:
        say(f"{self.title}: where the time of {name} goes")
        try:
            profile = process.ask("profile", self.breakdown_calls)
        except WorkerError as error:
            say(f"{self.title}: no breakdown: {error}")
            return
        self._put("breakdown", peer=name, **profile)

    def _save(self) -> None:
        self._put(
            "call",
            finished=self._finished,
            disturbed=max(self._disturbed),
            ours=OURS,
            rows=[row.as_dict() for row in self.rows.values()],
        )

    def _put(self, kind: str, **values: Any) -> None:
        self._store({"kind": kind} | self.case.key | {"machine": self.facts} | values)
