"""What surrounds a training loop: a bar, signals that wait for the running step, a loss log."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fastdiff.common.errors import InputError, memory_refused
from fastdiff.common.progress import progress_bar


@contextmanager
def training_bar(steps: int, finished: int, shown: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar, as a function that counts a step and shows its loss, averaged over some."""
    average: float | None = None
    with progress_bar(total=steps, initial=finished, desc="training", shown=shown) as bar:

        def count(loss: float) -> None:
            nonlocal average
            average = loss if average is None else 0.98 * average + 0.02 * loss
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            bar.update()

        yield count


def ema_decay(largest: float, step: int) -> float:
    """Decay of the averaged weights at a step, lower at first to forget the beginning."""
    return min(largest, (1 + step) / (10 + step))


class Dispensable:
    """Blocks that a run can do without: what fails in them is a warning, the first time."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """A block that fails for want of a file, of memory or of finite numbers goes on after it.

        Args:
            what: its name in the warning, which is given once for each name.
        """
        try:
            yield
        except Exception as error:
            refused = memory_refused(error)
            if not (refused or isinstance(error, (OSError, ValueError, ArithmeticError))):
                raise
            if what not in self._told:
                self._told.add(what)
                warnings.warn(
                    f"fastdiff: no {what}: {refused or error}; training goes on without",
                    stacklevel=4,
                )


@contextmanager
def deferred_signals() -> Iterator[list[signal.Signals]]:
    """Collect the first SIGINT or SIGTERM in a list; the second has its usual effect.

    Python delivers signals to the main thread only; elsewhere the list stays empty.
    """
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for which, handler in previous.items():
            signal.signal(which, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number))
        restore()

    for which in previous:
        signal.signal(which, handle)
    try:
        yield caught
    finally:
        restore()


def loss_log(path: Path, finished_steps: int) -> Callable[[Mapping[str, Any]], None]:
    """A function that appends an entry, one JSON object a line, to the log at ``path``.

    What an interrupted run has written of steps after ``finished_steps`` is cut off first. The
    function raises InputError for an entry that cannot be written, and for every entry if the log
    could not be cut; it leaves no part of a line.

    Raises:
        InputError: the log's folder takes no files, so that it will take no checkpoints either.
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
        partial.write_text("\n", encoding="utf-8")  # which a full disk does not take
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
    """Append all of a line to a file, or nothing; OSError if the disk does not take it."""
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
    """The whole lines of a loss log whose step is at most ``step``."""
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
