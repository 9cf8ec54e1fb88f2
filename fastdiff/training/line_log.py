"""A log of steps, one JSON object a line, that a full disk or a killed process does not spoil."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastdiff.checkpoints.folder import flush
from fastdiff.common.errors import InputError

WAITING = 100_000  # lines that wait at most for a disk that is full; older ones are given up


class LineLog:
    """Appends entries to a log; what cannot be written is kept, and written with a later entry.

    Lines of an interrupted run for steps after ``finished_steps`` are removed first. As long as
    that is impossible, nothing is written.

    Args:
        path: the file.
        finished_steps: step of the last entry to keep.

    Raises:
        InputError: no file can be written in the log's folder, so no checkpoint either.
    """

    def __init__(self, path: Path, finished_steps: int) -> None:
        self.path = path
        self._waiting: deque[bytes] = deque(maxlen=WAITING)
        self._to_cut: int | None = finished_steps  # the step, until the log is cut to it
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.write_text("\n", encoding="utf-8")  # fails if the disk is full
        except OSError as error:
            raise _unwritable(path, error) from None
        with suppress(OSError):  # tried again, and told of, when there is something to write
            self._cut()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append an entry, whose ``step`` is greater than that of the entry before.

        Raises:
            InputError: it cannot be written now; the file has no part of it.
        """
        self._waiting.append((json.dumps(entry) + "\n").encode())
        self.write()

    def write(self, *, flushed: bool = False) -> None:
        """Write what waits; InputError if that is impossible.

        Args:
            flushed: also wait until all is on the disk.
        """
        try:
            self._cut()
            if self._waiting:
                _append(self.path, b"".join(self._waiting))
                self._waiting.clear()
            if flushed and self.path.exists():
                flush(self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    @property
    def _partial(self) -> Path:
        return self.path.with_suffix(".partial")

    def _cut(self) -> None:
        """Remove the lines of later steps, unless they are removed already."""
        if self._to_cut is None:
            return
        try:
            kept = _lines_up_to(self.path, self._to_cut)
            self._partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            flush(self._partial)  # else a power loss could leave neither the old lines nor the new
            os.replace(self._partial, self.path)
        except OSError:
            self._partial.unlink(missing_ok=True)
            raise
        self._to_cut = None


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append an entry to any log of JSON lines; OSError, with the file as it was, if impossible."""
    _append(path, (json.dumps(entry) + "\n").encode())


def _append(path: Path, lines: bytes) -> None:
    """Append whole lines to a file; OSError, with the file as it was, if that is impossible."""
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.write(lines) != len(lines):
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
