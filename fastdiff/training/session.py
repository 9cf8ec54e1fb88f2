"""Around a training loop: signals that wait for the running step, errors that do not end it."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastdiff.common.errors import memory_refused

# What ends a run in good order: Ctrl-C, preemption, and a terminal that is closed.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ema_decay(largest: float, step: int) -> float:
    """Decay of the averaged weights at a step, lower at first so that they forget the start."""
    return min(largest, (1 + step) / (10 + step))


class Dispensable:
    """Makes the errors of ``with`` blocks that a training run does not need into warnings."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    @contextmanager
    def __call__(self, product: str, *, any_error: bool = False) -> Iterator[None]:
        """A ``with`` block whose errors of files, of memory or of values are warnings.

        Args:
            product: what the block makes, as the warning names it. There is one warning for each.
            any_error: every other error is a warning too, as of another package's code.
        """
        try:
            yield
        except Exception as error:
            refused = memory_refused(error)
            expected = refused or isinstance(error, (OSError, ValueError, ArithmeticError))
            if not (expected or any_error):
                raise
            if product not in self._warned:
                self._warned.add(product)
                reason = refused or str(error) or type(error).__name__
                warnings.warn(
                    f"fastdiff: no {product}: {reason}; training goes on without it",
                    stacklevel=4,
                )


@contextmanager
def deferred_signals() -> Iterator[list[signal.Signals]]:
    """For a ``with`` block, a list in which the first signal of :data:`ENDING` is put.

    The second signal has its usual effect. An ignored SIGHUP, as under nohup, stays ignored. Python
    delivers signals to the main thread only; in other threads the list stays empty.
    """
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous = {which: signal.getsignal(which) for which in ENDING}
    if previous[signal.SIGHUP] == signal.SIG_IGN:
        del previous[signal.SIGHUP]

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
