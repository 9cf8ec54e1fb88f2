"""The program of the process in which one peer runs: prepare and check a network, answer requests.

A request is a tuple of the name of a method of ``Worker`` and its arguments; the reply is
("done", result) or ("failed", reason).
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import machine
from benchmarks.unet import breakdown, sampling
from benchmarks.unet.job import Job, Prepared
from benchmarks.unet.models import NETWORKS
from benchmarks.unet.peers import PEERS, in_layout

REFERENCE = "reference"  # the job that computes what is expected
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # largest error, as a share of the largest output
SLOW = 3.0  # seconds of a call, from which on there are no warm-up calls
TURN = 0.25  # approximate least duration of a turn, in seconds


@dataclass
class Readiness:
    """The result of a peer's preparation.

    Attributes:
        first_call: seconds from the eager module to the first result.
        call: seconds of a later call.
        error: largest difference from eager float64, as a share of its largest value.
        notes: see ``Prepared``.
    """

    first_call: float
    call: float
    error: float
    notes: list[str]


class Worker:
    """Answers the requests of ``process.Process``."""

    def __init__(self, job: Job) -> None:
        self.job, self.network = job, NETWORKS[job.case.network].sized(job.case.size)
        self.prepared: Prepared | None = None
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.whole_peak: float | None = None

    def expect(self) -> None:
        """Write the file that all peers are checked with: inputs, and eager float64's output."""
        inputs = self.network.inputs(self.job.case.batch)
        module = self.network.make().double()
        fitted = Prepared(module, torch.float64).fit(inputs)
        torch.save((inputs, self.network.call(module, *fitted)), self.job.expected)

    def expect_samples(self, steps: int) -> None:
        """Write the file for the check of sampling loops: the images of eager float32."""
        module = in_layout(self.network.make(), torch.channels_last)
        prepared = Prepared(lambda *inputs: self.network.call(module, *inputs), torch.float32)
        x_T = self.network.inputs(self.job.case.batch)[0]
        torch.save(sampling.with_diffusers(prepared, x_T, steps), self._samples(steps))

    def prepare(self) -> Readiness:
        """Prepare the network and check its first output.

        Raises:
            ArithmeticError: the output differs by more than the tolerance.
        """
        module = self.network.make()
        inputs, expected = torch.load(self.job.expected)
        start = time.perf_counter()
        self.prepared = PEERS[self.job.peer].prepare(self.job, self.network, module)
        self.inputs = self.prepared.fit(inputs)
        y = self.prepared.call(*self.inputs)
        first_call = time.perf_counter() - start
        error = self._checked(y, expected, "float64")
        del module, y, expected
        call = self._timed()
        if call < SLOW:
            call = min(self._timed() for _ in range(3))
        self.whole_peak = machine.peak_memory()
        gc.collect()
        machine.give_back_freed()
        if not machine.reset_peak():
            self.whole_peak = None
        return Readiness(first_call, call, error, self.prepared.notes)

    def turn(self, call: float) -> list[float]:
        """Seconds of each call of a turn, for a peer whose call takes about ``call`` seconds."""
        if call < SLOW:
            self._timed()  # fills the caches again
        return [self._timed() for _ in range(max(1, min(50, round(TURN / call))))]

    def memory(self) -> tuple[float | None, float | None]:
        """Peak memory in MiB: with the preparation, and since the preparation."""
        running = machine.peak_memory()
        if self.whole_peak is None or running is None:  # the peak could not be reset
            return running, None
        return max(self.whole_peak, running), running

    def sample(self, steps: int, check: bool) -> tuple[float, float | None]:
        """Seconds of a sampling run, and with ``check`` the deviation of its images.

        Raises:
            ArithmeticError: the images differ by more than the tolerance.
        """
        assert self.prepared is not None
        x_T = self.network.inputs(self.job.case.batch)[0]
        ours = self.job.peer.startswith("fastdiff")
        run = sampling.with_fastdiff if ours else sampling.with_diffusers
        start = time.perf_counter()
        images = run(self.prepared, x_T, steps)
        seconds = time.perf_counter() - start
        if not check:
            return seconds, None
        return seconds, self._checked(images, torch.load(self._samples(steps)), "float32")

    def profile(self, calls: int) -> dict[str, Any]:
        """The time of each part of a call, see ``breakdown.measure``."""
        assert self.prepared is not None
        return breakdown.measure(self.prepared, self.inputs, calls)

    def _checked(self, output: torch.Tensor, expected: torch.Tensor, of: str) -> float:
        """The deviation of ``output``; ArithmeticError if it exceeds the tolerance.

        ``of`` is the dtype of the eager network that computed ``expected``, for the error.
        """
        error, tolerance = deviation(output, expected), TOLERANCE[self.job.case.dtype]
        if not error <= tolerance:
            raise ArithmeticError(
                f"wrong result: {error:.1e} of the output's scale from eager {of}, "
                f"at most {tolerance} is taken for rounding"
            )
        return error

    def _samples(self, steps: int) -> str:
        return f"{self.job.expected}.{steps}.samples"

    def _timed(self) -> float:
        assert self.prepared is not None
        start = time.perf_counter()
        self.prepared.call(*self.inputs)
        return time.perf_counter() - start


def deviation(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected value; NaN if any value is NaN."""
    difference = (output.double() - expected.double()).abs().max()
    return (difference / expected.abs().max()).item()


def main(connection: Connection, job: Job, log: str) -> None:
    """Answer requests until the connection closes; all output goes into the file ``log``."""
    os.setsid()  # a process group of its own, so that compilers' processes end with this one
    with open(log, "a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(job.case.threads)
    if job.keep_heap:
        machine.keep_heap()
    worker = Worker(job)
    with contextlib.suppress(EOFError, KeyboardInterrupt), torch.no_grad():
        while True:
            name, *arguments = connection.recv()
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
