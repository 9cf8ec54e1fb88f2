"""The worker of a pipeline's calls: prepares it by one peer and checks its images."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from benchmarks.pipelines.peers import PEERS
from benchmarks.pipelines.pipes import PIPES, call
from benchmarks.turns import run, worker
from benchmarks.turns.job import Job
from benchmarks.turns.worker import Readiness, serve

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # largest relative L2 error of the images


class Worker(worker.Worker):
    """Calls a pipeline; its error is the relative L2 norm of the images' from float64's."""

    slow = 20.0  # a whole call takes seconds

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.shape = PIPES[job.case.network]
        self.inputs = self.shape.inputs(job.case.batch)

    def expect(self) -> None:
        """Write the images that diffusers makes in eager float64."""
        pipe = self.shape.make().to(torch.float64)
        inputs = {name: value.double() for name, value in self.inputs.items()}
        torch.save(call(pipe, inputs), self.job.expected)

    def prepare(self) -> Readiness:
        peer, case = PEERS[self.job.peer], self.job.case
        dtype = peer.dtype(case)
        self.pipe = self.shape.make().to(dtype)
        self.inputs = {name: value.to(dtype) for name, value in self.inputs.items()}
        expected = torch.load(self.job.expected)
        start = time.perf_counter()
        notes = peer.prepare(self.pipe, case)
        images = self.call()
        first_call = time.perf_counter() - start
        error = float((images.double() - expected).norm() / expected.norm())
        if not error <= TOLERANCE[case.dtype]:
            raise ArithmeticError(
                f"wrong images: error {error:.1e}, at most {TOLERANCE[case.dtype]:.0e} is allowed"
            )
        return self.ready(first_call, error, notes)

    def call(self) -> Tensor:
        """A whole call of the pipeline."""
        return call(self.pipe, self.inputs)


def main(connection: Connection, job: Job, log: str) -> None:
    """The program of a process, see ``serve``."""
    serve(Worker, connection, job, log)


class Run(run.Run):
    """One case, all peers; see ``turns.run.Run``."""

    program = main
    slow = Worker.slow
