"""The logs in a run's folder, one JSON object a line: losses, speed, and the processes of the run.

``losses.jsonl`` has what training computed, a line a step, which a resumed run repeats to the last
digit. ``speed.jsonl`` has what the machine needed for it, a line for some seconds of steps.
``sessions.jsonl`` has a line for each process that worked on the run: its software and hardware.
"""

from __future__ import annotations

import math
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastdiff.common.machine_facts import processor
from fastdiff.common.version import __version__
from fastdiff.ops.backend import describe
from fastdiff.training.line_log import LineLog, append_line
from fastdiff.training.observers import Observer, RunStart, StepRecord

LOSSES = "losses.jsonl"
SPEED = "speed.jsonl"
SESSIONS = "sessions.jsonl"
SPEED_INTERVAL = 10.0  # seconds of training that a line of the speed stands for


class LossLog(Observer):
    """Writes the losses; a line that a full disk refuses is written later."""

    product = "line in the log"

    def __init__(self, out: Path) -> None:
        self._path = out / LOSSES

    def begin(self, start: RunStart) -> None:
        """Open the log; InputError if no file can be written in its folder."""
        self._log = LineLog(self._path, start.finished_steps)

    def step(self, record: StepRecord) -> None:
        """Write the values of a step; JSON has no numbers that are not finite, but null."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.values.items()
        }
        self._log.append({"step": record.step, **values, **(record.refusal or {})})

    def before_checkpoint(self, step: int) -> None:
        """See that the lines are on the disk before a checkpoint that follows them is."""
        self._log.write(flushed=True)


class SpeedLog(Observer):
    """Writes sums over the steps of some seconds, and at each checkpoint."""

    product = "line in the log of the speed"

    def __init__(self, out: Path) -> None:
        self._path = out / SPEED
        self._since: list[StepRecord] = []
        self._seconds = 0.0

    def begin(self, start: RunStart) -> None:
        """Open the log."""
        self._log = LineLog(self._path, start.finished_steps)

    def step(self, record: StepRecord) -> None:
        """Count a step, and write a line if it is time."""
        self._since.append(record)
        self._seconds += record.seconds
        if self._seconds >= SPEED_INTERVAL:
            self._write()

    def checkpoint(self, step: int) -> None:
        """Write a line, since steps after a checkpoint may be lost."""
        self._write()

    def end(self) -> None:
        """Write what is not yet written."""
        self._write()

    def _write(self) -> None:
        records, seconds = self._since, self._seconds
        self._since, self._seconds = [], 0.0
        if not records:
            return
        last = records[-1]
        line = {
            "step": last.step,
            "steps": len(records),
            "images": sum(record.images for record in records),
            "seconds": round(seconds, 6),
            "waited": round(sum(record.waited for record in records), 6),
            "memory": last.memory,
        }
        if last.device_memory is not None:
            line["device_memory"] = last.device_memory
        self._log.append(line)


class SessionLog(Observer):
    """Writes a line when a process begins to work on the run."""

    product = "line in the log of processes"

    def __init__(self, out: Path) -> None:
        self._path = out / SESSIONS
        self._entry: dict[str, Any] | None = None

    def begin(self, start: RunStart) -> None:
        """Keep what the line says; it is written with the first step, which an error cannot end."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = {"step": start.finished_steps, "began": now, "command": _command(), **_software()}
        self._entry = {**entry, **start.facts}

    def step(self, record: StepRecord) -> None:
        """Write the line."""
        if self._entry is not None:
            entry, self._entry = self._entry, None
            append_line(self._path, entry)


def _command() -> str | None:
    """The command line of this process, or None if it is another program than fastdiff's own."""
    name = Path(sys.argv[0]).name
    if name in ("fastdiff", "__main__.py"):
        return shlex.join(["fastdiff", *sys.argv[1:]])
    return None


def _software() -> dict[str, Any]:
    kernels = describe()
    return {
        "fastdiff": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "backend": kernels["backend"],
        "instruction_set": kernels["isa"],
    }
