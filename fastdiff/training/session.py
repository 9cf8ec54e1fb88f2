"""Around a training loop: its progress bar, signals that wait for the running step, a loss log."""

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
    """For a ``with`` block, a progress bar: a function that is called with the loss of each step.

    The bar shows a moving average of the losses.
    """
    average: float | None = None
    with progress_bar(total=steps, initial=finished, desc="training", shown=shown) as bar:

        def count(loss: float) -> None:
            nonlocal average
            average = loss if average is None else 0.98 * average + 0.02 * loss
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            bar.update()

        yield count


def ema_decay(largest: float, step: int) -> float:
    """Decay of the averaged weights at a step, lower at first so that they forget the start."""
    return min(largest, (1 + step) / (10 + step))


class Dispensable:
    """Makes the errors of ``with`` blocks that a training run does not need into warnings."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    @contextmanager
    def __call__(self, product: str) -> Iterator[None]:
        """A ``with`` block whose errors of files, of memory or of values are warnings.

        Args:
            product: what the block makes, as the warning names it. There is one warning for each.
        """
        try:
            yield
        except Exception as error:
            refused = memory_refused(error)
            if not (refused or isinstance(error, (OSError, ValueError, ArithmeticError))):
                raise
            if product not in self._warned:
                self._warned.add(product)
                warnings.warn(
                    f"fastdiff: no {product}: {refused or error}; training goes on without it",
                    stacklevel=4,
                )


@contextmanager
def deferred_signals() -> Iterator[list[signal.Signals]]:
    """For a ``with`` block, a list in which the first SIGINT or SIGTERM is put.

    The second signal has its usual effect. Python delivers signals to the main thread only; in
    other threads the list stays empty.
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
    """The complete lines of a loss log up to step ``step``."""
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
