"""Writes the report of a run: at the end of the run, and at checkpoints while it goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff.common.errors import InputError
from fastdiff.data.image_grid import check_writable
from fastdiff.training.observers import Observer, RunStart, StepRecord
from fastdiff.training.run_logs import LOSSES
from fastdiff.training.run_report.report_page import page
from fastdiff.training.run_report.run_record import RunRecord

REPORT = "report.html"
SHARE = 0.01  # largest share of a run's time that reports at checkpoints take


def write(folders: Sequence[str | Path], target: Path) -> None:
    """Write a report of one run, or of several side by side, into a file.

    Args:
        folders: of the runs.
        target: the file; after an error it is as it was before.

    Raises:
        InputError: a folder is not that of a run, or the file cannot be written.
    """
    check_writable(target)
    text = page([RunRecord.read(folder) for folder in folders])
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        # Names of files may hold bytes that are no text.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


class ReportWriter(Observer):
    """Writes ``report.html`` into a run's folder.

    A report of a long run takes seconds, as it reads the whole log. So there is one at a checkpoint
    only if reports have taken less than :data:`SHARE` of the time, and always one at the end.
    """

    product = "report"

    def __init__(self, out: Path) -> None:
        self._out = out
        self._spent = 0.0
        self._news = False

    def begin(self, start: RunStart) -> None:
        """Note the time."""
        self._began = time.monotonic()

    def step(self, record: StepRecord) -> None:
        """Note that there is something to report."""
        self._news = True

    def grid(self, step: int, picture: Any) -> None:
        """Likewise."""
        self._news = True

    def checkpoint(self, step: int) -> None:
        """Write a report, unless reports have taken too long already."""
        if self._spent <= SHARE * (time.monotonic() - self._began):
            self._write()

    def end(self) -> None:
        """Write a report if there is news."""
        if self._news:
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        self._news = False
        if not (self._out / LOSSES).is_file():  # which had its own warning
            return
        write([self._out], self._out / REPORT)
        self._spent += time.monotonic() - began
