"""The program of the process in which one peer runs: prepare and check it, answer requests.

A request is a tuple of the name of a method of a ``Worker`` and its arguments; the reply is
("done", result) or ("failed", reason).
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import machine
from benchmarks.turns.job import Job

SLOW = 3.0  # seconds of a call, from which on there are no warm-up calls
TURN = 0.25  # approximate least duration of a turn, in seconds


@dataclass
class Readiness:
    """The result of a peer's preparation.

    Attributes:
        first_call: seconds from the eager module to the first result.
        call: seconds of a later call.
        error: of the first result, from eager float64.
        notes: remarks for the report.
    """

    first_call: float
    call: float
    error: float
    notes: list[str]


class Worker:
    """Answers the requests of ``process.Process``.

    Args:
        job: see ``Job``.

    Attributes:
        slow: see ``SLOW``.
    """

    slow = SLOW

    def __init__(self, job: Job) -> None:
        self.job = job
        self.whole_peak: float | None = None

    def expect(self) -> None:
        """Write the file that all peers are checked with."""
        raise NotImplementedError

    def prepare(self) -> Readiness:
        """Prepare the peer and check its first result.

        Raises:
            ArithmeticError: the result differs from the expected one by more than the tolerance.
        """
        raise NotImplementedError

    def call(self) -> object:
        """What is timed."""
        raise NotImplementedError

    def ready(self, first_call: float, error: float, notes: list[str]) -> Readiness:
        """Warm up after the first call, and begin to measure memory anew."""
        call = self.timed()
        if call < self.slow:
            call = min(self.timed() for _ in range(3))
        self.whole_peak = machine.peak_memory()
        gc.collect()
        machine.give_back_freed()
        if not machine.reset_peak():
            self.whole_peak = None
        return Readiness(first_call, call, error, notes)

    def turn(self, call: float) -> list[float]:
        """Seconds of each call of a turn, for a peer whose call takes about ``call`` seconds."""
        if call < self.slow:
            self.timed()  # fills the caches again
        return [self.timed() for _ in range(max(1, min(50, round(TURN / call))))]

    def memory(self) -> tuple[float | None, float | None]:
        """Peak memory in MiB: with the preparation, and since the preparation."""
        running = machine.peak_memory()
        if self.whole_peak is None or running is None:  # the peak could not be reset
            return running, None
        return max(self.whole_peak, running), running

    def timed(self) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


def serve(make: Callable[[Job], Worker], connection: Connection, job: Job, log: str) -> None:
    """Answer requests until the connection closes; all output goes into the file ``log``."""
    os.setsid()  # a process group of its own, so that compilers' processes end with this one
    with open(log, "a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(job.case.threads)
    if job.keep_heap:
        machine.keep_heap()
    worker = make(job)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            name, *arguments = connection.recv()
            reply: tuple[str, Any]
            try:
                reply = ("done", getattr(worker, name)(*arguments))
            except Exception as error:
                traceback.print_exc()
                sys.stderr.flush()
                reply = ("failed", _reason(error))
            connection.send(reply)


def _reason(error: Exception) -> str:
    lines = [entry.strip() for entry in str(error).splitlines() if entry.strip()]
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
