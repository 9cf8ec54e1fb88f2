"""The order of a run: compute expected outputs, prepare and check every peer, then time in turns.

All peers of a run are alive at once, each in its own process; while one is timed the others wait. A
pause before each turn lets the threads of the previous peer go to sleep; the processor time that
waiting processes take nevertheless is measured and reported. Networks too large for that are held
by one process at a time, which is started, prepared and timed once per round.
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
from benchmarks.unet.job import Case, Job
from benchmarks.unet.models import NETWORKS
from benchmarks.unet.peers import INDUCTOR, OURS, PEERS
from benchmarks.unet.process import Process, WorkerError, idle_share
from benchmarks.unet.worker import REFERENCE, SLOW

PAUSE = 0.05  # seconds before a turn; libgomp's threads spin for 5 ms, ONNX Runtime's for 1 ms
SLOW_ROUNDS = 3  # rounds of peers whose call takes longer than SLOW
HEAVY_ROUNDS, HEAVY_TURNS = 2, 3  # rounds, and turns per round, of heavy networks
SAMPLING_ROUNDS = 3
BREAKDOWN_CALLS = 10
NOT_SAMPLED = (
    "eager",
    "fastdiff strict",
    "fastdiff bf16",
)  # peers without sampling loops, being like another peer

Store = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """Options of the command line for every run.

    Attributes:
        rounds: number of turns of each peer.
        limit: longest time for an answer, compilation included, in seconds.
        keep_heap: keep freed memory in the process.
        warm: start every peer again after its first calls, for the time of a first call with the
            caches that an earlier process left; heavy networks always are.
        sampling: steps of a sampling loop; None for no loops.
        breakdown: the peer whose calls are broken down; None for none.
        folder: for the files and logs of the processes.
    """

    rounds: int
    limit: float
    keep_heap: bool
    warm: bool
    sampling: int | None
    breakdown: str | None
    folder: Path


@dataclass
class Row:
    """A peer's figures in one run; times in seconds, memory in MiB.

    Attributes:
        peer: a key of ``PEERS``.
        failed: the reason why figures are missing, or None.
        times: of each call, or of each sampling loop.
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
        peers: keys of ``PEERS``; peers that do not support the dtype are left out.
        settings: options of the command line.
        store: called with the record after every change of it.
    """

    def __init__(
        self,
        case: Case,
        peers: Sequence[str],
        settings: Settings,
        store: Store,
    ) -> None:
        self.case, self.settings, self.title = case, settings, case.title
        self.network = NETWORKS[case.network]
        self.rows = {name: Row(name) for name in peers if case.dtype in PEERS[name].dtypes}
        # float64's output is the same for every dtype and number of threads.
        self.expected = settings.folder / f"{case.network}-{case.batch}-{case.size}.pt"
        self.facts = machine.facts(case.threads if case.size is None else None)
        self._finished = False
        self._store = store
        self._disturbed = [0.0]  # cores that others took, turn by turn

    def run(self) -> None:
        """Everything that was asked for; failures end up in the rows."""
        self._run()
        self._finished = True
        self._save()

    def _run(self) -> None:
        say(f"{self.title}: what float64 makes of it")
        try:
            if not self.expected.exists():
                self._reference("expect")
        except WorkerError as error:
            say(f"{self.title}: not run: {error}")
            for row in self.rows.values():
                row.failed = f"nothing to check it against: {error}"
            return
        if self.network.heavy:
            self._one_at_a_time()
            return
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
            if self.settings.sampling is not None and self.network.takes_time:
                self._sampling(alive, self.settings.sampling)
            if self.settings.breakdown in alive:
                self._breakdown(alive[self.settings.breakdown], self.settings.breakdown)
        finally:
            for process in alive.values():
                process.close()

    def _job(self, peer: str) -> Job:
        folder = f"{self.title}-{peer}".replace(", ", "-").replace(" ", "-")
        settings = self.settings
        return Job(self.case, peer, settings.folder / folder, self.expected, settings.keep_heap)

    def _reference(self, *request: Any) -> None:
        with Process(self._job(REFERENCE), self.settings.limit) as process:
            process.ask(*request)

    def _ready(self, name: str) -> Process | None:
        """The process of a peer after its first calls, or None with the reason in its row."""
        row = self.rows[name]
        say(f"{self.title}: {name} gets ready")
        process = Process(self._job(name), self.settings.limit)
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
                if (row.call or 0) > SLOW and number >= SLOW_ROUNDS:
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

    def _one_at_a_time(self) -> None:
        for number in range(min(HEAVY_ROUNDS, self.settings.rounds)):
            say(f"{self.title}: round {number + 1}, one process at a time")
            for name, row in self.rows.items():
                process = None if row.failed else self._ready(name)
                if process is None:
                    continue
                with process:
                    for _ in range(HEAVY_TURNS):
                        if not row.failed:
                            self._turn(row, process, [])
                    if not row.failed:
                        self._ask_memory(row, process)
                    if not row.failed and number == 0 and self.settings.breakdown == name:
                        self._breakdown(process, name)
                self._save()

    def _sampling(self, alive: dict[str, Process], steps: int) -> None:
        chosen = [name for name in alive if self._is_sampled(name)]
        say(f"{self.title}: {steps} steps of DDIM, what float32 makes of them")
        try:
            self._reference("expect_samples", steps)
        except WorkerError as error:
            say(f"{self.title}: no sampling: {error}")
            return
        rows = {name: Row(name) for name in chosen}
        for number in range(-1, SAMPLING_ROUNDS):
            for name in chosen:
                row, process = rows[name], alive[name]
                if row.failed or ((self.rows[name].call or 0) > SLOW and number > 0):
                    continue
                time.sleep(PAUSE)
                try:
                    if number < 0:  # warms up what only a loop does, and is checked
                        _, row.error = process.ask("sample", steps, True)
                    else:
                        row.times.append(process.ask("sample", steps, False)[0])
                except WorkerError as error:
                    row.failed = str(error)
                    alive.pop(name).close()
                outcome = f"{row.times[-1]:.2f} s" if row.times else f"error {row.error}"
                say(f"{self.title}: {steps} steps, {name}: {row.failed or outcome}")
            self._put("sampling", steps=steps, rows=[row.as_dict() for row in rows.values()])

    def _is_sampled(self, name: str) -> bool:
        """Whether a peer is worth a loop: of Inductor's variants only the fastest is."""
        if PEERS[name].summary != INDUCTOR:
            return name not in NOT_SAMPLED
        variants = [row for row in self.rows.values() if PEERS[row.peer].summary == INDUCTOR]
        timed = [row for row in variants if row.times and not row.failed]
        return bool(timed) and name == min(timed, key=lambda row: statistics.median(row.times)).peer

    def _breakdown(self, process: Process, name: str) -> None:
        say(f"{self.title}: where the time of {name} goes")
        try:
            profile = process.ask("profile", BREAKDOWN_CALLS)
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
