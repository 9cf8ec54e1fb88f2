"""What surrounds a training loop: a bar, signals that wait for the running step, a loss log."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm.auto import tqdm

from fastdiff.errors import InputError


@contextmanager
def training_bar(steps: int, finished: int, shown: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar, as a function that counts a step and shows its loss, averaged over some."""
    average: float | None = None
    with tqdm(total=steps, initial=finished, desc="training", disable=not shown) as bar:

        def count(loss: float) -> None:
            nonlocal average
            average = loss if average is None else 0.98 * average + 0.02 * loss
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            bar.update()

        yield count


def ema_decay(largest: float, step: int) -> float:
    """Decay of the averaged weights at a step, lower at first to forget the beginning."""
    return min(largest, (1 + step) / (10 + step))


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

    What an interrupted run has written of steps after ``finished_steps`` is cut off first.

    Raises:
        InputError: the log cannot be written; so does the function.
    """

    def append(entry: Mapping[str, Any]) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise _unwritable(path, error) from None

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        kept = _lines_up_to(path, finished_steps)
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from None
    return append


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}")


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of a loss log whose step is at most ``step``."""
    kept: list[str] = []
    if not path.exists():
        return kept
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):  # a line cut short when the machine stopped
            break
        kept.append(line)
    return kept
