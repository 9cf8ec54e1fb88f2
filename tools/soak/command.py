"""The training run of the soak: its images, its command and its processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastdiff.checkpoints import checkpoint

ROOT = Path(__file__).resolve().parents[2]
WAIT = 120.0  # seconds in which a process must do what is expected of it, on a busy machine too
POLL = 0.005  # seconds between two looks
OPTIONS = (
    "--image-size", "8", "--channels", "8,16", "--layers-per-block", "1", "--attention", "1",
    "--dropout", "0.1", "--batch-size", "8", "--warmup", "5", "--label-dropout", "0.1",
    "--save-every", "10", "--sample-every", "50", "--keep", "2", "--flip", "--threads", "1",
    "--ema", "0.999,0.9", "--ema-std", "0.1", "--snapshots", "6",
)  # fmt: skip


def write_images(folder: Path) -> None:
    """Write forty 8x8 images of two classes."""
    for number in range(40):
        path = folder / ("even", "odd")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


@dataclass(frozen=True)
class Command:
    """How the run is started.

    Attributes:
        images: folder of the images.
        steps: of the run.
        ranks: number of processes that train; above 1 they are started by torchrun.
        workers: number of processes that read images for each of these; the images are then in no
            cache.
        extra: further options of ``fastdiff train``.
    """

    images: Path
    steps: int
    ranks: int = 1
    workers: int = 0
    extra: tuple[str, ...] = ()

    def words(self, out: Path) -> list[str]:
        """The command line that begins the run in ``out``, or continues it."""
        launch = ["-m", "fastdiff"]
        if self.ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            launch = [*torchrun, "--nproc-per-node", str(self.ranks), *launch]
        if checkpoint.newest(out) is not None:
            return [sys.executable, *launch, "train", "--out", str(out), "--resume"]
        given = ("--data", str(self.images), "--steps", str(self.steps), *OPTIONS, *self.extra)
        if self.workers:
            given += ("--cache", "0", "--workers", str(self.workers))
        return [sys.executable, *launch, "train", "--out", str(out), *given]


class Run:
    """The processes that work on a run: a first one, and what it has started.

    Args:
        command: how to start them.
        out: the run's folder.
    """

    def __init__(self, command: Command, out: Path) -> None:
        self.out = out
        self._notes = out.with_suffix(".stderr")
        self._ranks = command.ranks
        before = self._lines()
        with self._notes.open("wb") as notes:
            self.process = subprocess.Popen(
                command.words(out),
                stdout=subprocess.DEVNULL,
                stderr=notes,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
        self._last_line = before[-1:]

    def notes(self) -> str:
        """What the processes have written on standard error."""
        return self._notes.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, happened: Callable[[], bool], seconds: float = WAIT) -> bool:
        """Wait until something has happened; False if the time is over or the run ends before."""
        until = time.monotonic() + seconds
        while not happened():
            if self.process.poll() is not None or time.monotonic() > until:
                return happened()
            time.sleep(POLL)
        return True

    def trains(self) -> bool:
        """Whether the processes have finished a step, to judge by the log."""
        lines = self._lines()
        return bool(lines) and lines[-1:] != self._last_line

    def sleep(self, seconds: float) -> None:
        """Wait some time, or until the run ends."""
        self.wait_until(lambda: False, seconds)

    def training(self) -> list[int]:
        """The processes that train: the first one, or those that it has started as torchrun."""
        return [self.process.pid] if self._ranks == 1 else children(self.process.pid)

    def all(self) -> list[int]:
        """All processes, torchrun and those that read images included."""
        found = [self.process.pid]
        for pid in found:
            found += children(pid)
        return found

    def limit_files(self, size: int) -> None:
        """Let the processes write no file beyond a size, as if the disk were full; -1 for any."""
        for pid in self.training():
            with suppress(ProcessLookupError):
                hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))

    @contextmanager
    def halted(self) -> Iterator[None]:
        """For a ``with`` block, the processes stand still."""
        halted = self.all()
        send(halted, signal.SIGSTOP)
        try:
            yield
        finally:
            send(halted, signal.SIGCONT)

    def kill(self) -> None:
        """Kill -9 all processes."""
        doomed = self.all()
        send(doomed, signal.SIGSTOP)  # so that none starts another meanwhile
        doomed += [pid for pid in self.all() if pid not in doomed]
        send(doomed, signal.SIGKILL)
        self.process.wait()
        if not gone(doomed, WAIT):
            raise RuntimeError(f"processes {doomed} survive SIGKILL")

    def ended(self, seconds: float = WAIT) -> int | None:
        """The exit code, or None if the run goes on after some time, which ends it."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def _lines(self) -> list[str]:
        try:
            return (self.out / "losses.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still exist."""
    found: list[int] = []
    with suppress(OSError):  # it has ended
        for listed in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, listed.read_text(encoding="utf-8").split())
    return found


def send(pids: Iterable[int], which: signal.Signals) -> None:
    """Send a signal to those of the processes that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, which)


def gone(pids: Sequence[int], seconds: float) -> bool:
    """Wait until processes have ended; False if one still runs after some time."""
    until = time.monotonic() + seconds
    while any(_lives(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(POLL)
    return True


def _lives(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent to look at it does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"
