"""The run of a U-Net's calls: in turns, with sampling loops, and large networks one at a time.

Networks too large for all peers to be alive at once are held by one process at a time, which is
started, prepared and timed once per round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.turns import run
from benchmarks.turns.job import Case
from benchmarks.turns.process import Process, WorkerError
from benchmarks.turns.run import PAUSE, Row, Store, say
from benchmarks.unet.models import NETWORKS
from benchmarks.unet.peers import INDUCTOR, PEERS
from benchmarks.unet.worker import main

HEAVY_ROUNDS, HEAVY_TURNS = 2, 3  # rounds, and turns per round, of heavy networks
SAMPLING_ROUNDS = 3
NOT_SAMPLED = (
    "eager",
    "fastdiff strict",
    "fastdiff bf16",
)  # peers without sampling loops, being like another peer


@dataclass(frozen=True)
class Settings(run.Settings):
    """Options of the command line for every run; heavy networks are always started again.

    Attributes:
        sampling: steps of a sampling loop; None for no loops.
    """

    sampling: int | None = None


class Run(run.Run):
    """One case, all peers that support its dtype; see ``turns.run.Run``."""

    program = main
    settings: Settings

    def __init__(self, case: Case, peers: Sequence[str], settings: Settings, store: Store) -> None:
        supporting = [name for name in peers if case.dtype in PEERS[name].dtypes]
        super().__init__(case, supporting, settings, store)
        self.network = NETWORKS[case.network]

    def _expected_by(self) -> str:
        # float64's output is the same for every dtype and number of threads.
        return f"{self.case.network}-{self.case.batch}-{self.case.size}"

    def _run(self) -> None:
        if self.network.heavy:
            self._one_at_a_time()
        else:
            super()._run()

    def _afterwards(self, alive: dict[str, Process]) -> None:
        if self.settings.sampling is not None and self.network.takes_time:
            self._sampling(alive, self.settings.sampling)
        super()._afterwards(alive)

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
                if row.failed or ((self.rows[name].call or 0) > self.slow and number > 0):
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
