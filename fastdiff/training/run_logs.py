"""The logs in a run's folder, one JSON object a line: losses, speed, and the processes of the run.

``losses.jsonl`` has what training computed, a line a step, which a resumed run repeats to the last
digit. ``speed.jsonl`` has what the machine needed for it, a line for some seconds of steps.
``sessions.jsonl`` has a line for each process that worked on the run: its software and hardware.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastdiff.common.errors import InputError
from fastdiff.common.machine_facts import processor
from fastdiff.common.version import __version__
from fastdiff.ops.backend import describe
from fastdiff.training.observers import Observer, RunStart, StepRecord

LOSSES = "losses.jsonl"
SPEED = "speed.jsonl"
SESSIONS = "sessions.jsonl"
SPEED_INTERVAL = 10.0  # seconds of training that a line of the speed stands for


class LossLog(Observer):
    """Writes the losses; see :func:`line_log`."""

    product = "line in the log"

    def __init__(self, out: Path) -> None:
        self._path = out / LOSSES

    def begin(self, start: RunStart) -> None:
        """Open the log; InputError if no file can be written in its folder."""
        self._append = line_log(self._path, start.finished_steps)

    def step(self, record: StepRecord) -> None:
        """Write the values of a step."""
        self._append({"step": record.step, **record.values})


class SpeedLog(Observer):
    """Writes sums over the steps of some seconds, and at each checkpoint."""

    product = "line in the log of the speed"

    def __init__(self, out: Path) -> None:
        self._path = out / SPEED
        self._since: list[StepRecord] = []
        self._seconds = 0.0

    def begin(self, start: RunStart) -> None:
        """Open the log."""
        self._append = line_log(self._path, start.finished_steps)

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
        self._append(line)


class SessionLog(Observer):
    """Writes a line when a process begins to work on the run."""

    product = "line in the log of processes"

    def __init__(self, out: Path) -> None:
        self._path = out / SESSIONS
        self._line: bytes | None = None

    def begin(self, start: RunStart) -> None:
        """Keep what the line says; it is written with the first step, which an error cannot end."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = {"step": start.finished_steps, "began": now, "command": _command(), **_software()}
        self._line = (json.dumps({**entry, **start.facts}) + "\n").encode()

    def step(self, record: StepRecord) -> None:
        """Write the line."""
        if self._line is not None:
            line, self._line = self._line, None
            _append(self._path, line)


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


def line_log(path: Path, finished_steps: int) -> Callable[[Mapping[str, Any]], None]:
    """A function that appends an entry, one JSON object per line, to the log at ``path``.

    Lines of an interrupted run for steps after ``finished_steps`` are removed first. The function
    raises InputError if an entry cannot be written, and for every entry if those lines could not be
    removed; it never leaves a part of a line.

    Raises:
        InputError: no file can be written in the log's folder, so no checkpoint either.
    """
    uncut: OSError | None = None

    def append(entry: Mapping[str, Any]) -> None:
        try:
            if uncut is not None:
                raise uncut
            _append(path, (json.dumps(entry) + "\n").encode())
        except OSError as error:
            raise _unwritable(path, error) from None

    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("\n", encoding="utf-8")  # fails if the disk is full
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        kept = _lines_up_to(path, finished_steps)
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        uncut = error
        partial.unlink(missing_ok=True)
    return append


def _append(path: Path, line: bytes) -> None:
    """Append a whole line to a file; OSError, with the file as it was, if that is impossible."""
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}")


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The complete lines of a log up to step ``step``."""
    kept: list[str] = []
    if not path.exists():
        return kept
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):  # a line cut short when the machine stopped
            break
        kept.append(line)
    return kept
