"""The worker of a U-Net's calls: prepares a network by one peer and checks its outputs."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.turns import worker
from benchmarks.turns.job import Job
from benchmarks.turns.worker import Readiness, serve
from benchmarks.unet import breakdown, sampling
from benchmarks.unet.models import NETWORKS
from benchmarks.unet.peers import PEERS, in_layout
from benchmarks.unet.prepared import Prepared

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # largest error, as a share of the largest output


class Worker(worker.Worker):
    """Prepares a network for its calls; its error is that of its output, see ``deviation``."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.network = NETWORKS[job.case.network].sized(job.case.size)
        self.prepared: Prepared | None = None
        self.inputs: tuple[torch.Tensor, ...] = ()

    def expect(self) -> None:
        """Write inputs, and eager float64's output."""
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
        module = self.network.make()
        inputs, expected = torch.load(self.job.expected)
        start = time.perf_counter()
        self.prepared = PEERS[self.job.peer].prepare(self.job, self.network, module)
        self.inputs = self.prepared.fit(inputs)
        y = self.call()
        first_call = time.perf_counter() - start
        error = self._checked(y, expected, "float64")
        del module, y, expected
        return self.ready(first_call, error, self.prepared.notes)

    def call(self) -> torch.Tensor:
        """A call of the network."""
        assert self.prepared is not None
        return self.prepared.call(*self.inputs)

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


def deviation(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected value; NaN if any value is NaN."""
    difference = (output.double() - expected.double()).abs().max()
    return (difference / expected.abs().max()).item()


def main(connection: Connection, job: Job, log: str) -> None:
    """The program of a process, see ``serve``."""
    with torch.no_grad():
        serve(Worker, connection, job, log)
