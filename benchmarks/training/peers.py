"""How each peer takes a training step: as its users would, with its fastest settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.training.step import FusedStep, PlainStep, Step, TrainerStep
from benchmarks.training.tasks import TASKS
from benchmarks.turns.job import OURS, Case

EAGER = "eager channels_last"


@dataclass(frozen=True)
class Peer:
    """One way to train a network.

    Attributes:
        title: in tables.
        backend: of torch.compile; None is eager.
    """

    title: str
    backend: str | None

    def step(self, case: Case, module: nn.Module) -> Step:
        """The training step of a case.

        Args:
            case: the task and its batch and dtype; bfloat16 is autocast, with float32 weights.
            module: the task's network, float32; it is trained in place or copied.
        """
        task, autocast = TASKS[case.network], case.dtype == "bfloat16"
        if self.backend == OURS:
            import fastdiff.compiler  # noqa: F401 - registers it, installed or not

            if task.trainer:
                return TrainerStep(task, case.batch, module, autocast)
        run: Callable[..., Any] = module
        if self.backend is not None:
            run = torch.compile(module, backend=self.backend, dynamic=False)
        taken = FusedStep if self.backend == OURS else PlainStep
        return taken(task, case.batch, module, run, autocast)


PEERS = {
    OURS: Peer("fastdiff", OURS),
    "inductor channels_last": Peer("torch.compile, Inductor, channels_last", "inductor"),
    EAGER: Peer("diffusers, eager, channels_last", None),
}
