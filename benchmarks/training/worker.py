"""The worker of training steps: makes a peer's step, and checks the gradients of its first."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.training import breakdown
from benchmarks.training.gradients import check, errors, gradients
from benchmarks.training.peers import EAGER, PEERS
from benchmarks.training.step import PlainStep, Step
from benchmarks.training.tasks import TASKS, Batch
from benchmarks.turns import worker
from benchmarks.turns.job import Job
from benchmarks.turns.worker import Readiness, serve


class Worker(worker.Worker):
    """Takes training steps; its error is that of the gradient, see ``gradients.errors``."""

    slow = 10.0  # a step of a peer that gets all its turns may take seconds

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.task = TASKS[job.case.network]
        self.step: Step | None = None

    def expect(self) -> None:
        """Write a batch, its gradient in eager float64, and the errors of eager in the dtype."""
        case = self.job.case
        generator = torch.Generator().manual_seed(0)
        batch = self.task.draw(self.task.images(), case.batch, generator)
        module = self.task.module()
        eager = gradients(PEERS[EAGER].step(case, module), batch)
        module = module.double()
        step = PlainStep(self.task, case.batch, module, module)
        exact = gradients(step, batch.to(torch.float64))
        torch.save((tuple(batch), exact, errors(eager, exact)), self.job.expected)

    def prepare(self) -> Readiness:
        module = self.task.module()
        batch, exact, eager = torch.load(self.job.expected)
        start = time.perf_counter()
        self.step = PEERS[self.job.peer].step(self.job.case, module)
        found = gradients(self.step, Batch(*batch))
        first_call = time.perf_counter() - start
        error = check(errors(found, exact), eager)
        del module, batch, exact, eager, found
        return self.ready(first_call, error, [])

    def call(self) -> None:
        """A training step."""
        assert self.step is not None
        self.step()

    def profile(self, calls: int) -> dict[str, Any]:
        """The time of each part of a step, see ``breakdown.measure``."""
        return breakdown.measure(self.call, calls)


def main(connection: Connection, job: Job, log: str) -> None:
    """The program of a process, see ``serve``."""
    serve(Worker, connection, job, log)
