"""A training step: noising, forward, loss, backward, AdamW and the running average of the weights.

``PlainStep`` is written as PyTorch's users write it, with PyTorch's fastest AdamW and average;
``FusedStep`` has fastdiff's AdamW in their place.
``TrainerStep`` is the same step through ``fastdiff.training``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from benchmarks.training.tasks import Batch, Task
from fastdiff import ops
from fastdiff.nn import UNet2DModel
from fastdiff.training import Trainer, TrainingOptions, batches
from fastdiff.training.adamw import AdamW, clipping_factor

LR = 1e-4
EMA = 0.999  # decay of the running average
ENDLESS = 2**30  # steps of a training that is stopped


class Step(Protocol):
    """A training step that can be timed, and whose gradients can be checked."""

    @property
    def module(self) -> nn.Module:
        """The network, its parameters named as in diffusers."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar with a gradient."""

    def __call__(self) -> None:
        """Take a step on a new batch."""


class PlainStep:
    """The step in plain PyTorch.

    Args:
        task: what is trained.
        size: images in a batch.
        module: the network.
        run: the network as it is called, compiled or not: (x_t, t[, labels]) -> prediction.
        autocast: to bfloat16.
    """

    def __init__(
        self,
        task: Task,
        size: int,
        module: nn.Module,
        run: Callable[..., Any],
        autocast: bool = False,
    ) -> None:
        self.task, self.size, self.module, self.run = task, size, module, run
        self.autocast = autocast
        self.images = task.images()
        self.parameters = list(module.parameters())
        self.averages = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, fused=True)

    def loss(self, batch: Batch) -> Tensor:
        """The mean squared error of the prediction."""
        x0, labels, t, noise = batch
        schedule = self.task.schedule
        alpha, sigma = (
            table[t].view(-1, 1, 1, 1).to(x0.dtype)
            for table in (schedule.alpha_t, schedule.sigma_t)
        )
        x_t = alpha * x0 + sigma * noise
        target = noise if self.task.prediction == "eps" else alpha * noise - sigma * x0
        given = (x_t, t) if labels is None else (x_t, t, labels)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            prediction = self.run(*given, return_dict=False)[0]
        return F.mse_loss(prediction.to(target.dtype), target)

    def __call__(self) -> None:
        """Take a step on a new batch."""
        with record_function("data"):
            batch = self.task.draw(self.images, self.size)
        with record_function("forward"):
            loss = self.loss(batch)
        with record_function("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.update()

    def update(self) -> None:
        """Clip the gradient where the task wants it, update the weights, average them."""
        with record_function("optimizer"):
            if self.task.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.task.clip)
            self.optimizer.step()
        with record_function("ema"), torch.no_grad():
            torch._foreach_lerp_(self.averages, [*self.parameters], 1 - EMA)


class FusedStep(PlainStep):
    """The same, but for fastdiff's AdamW, which clips and averages in its one pass."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.optimizer = self.fused = AdamW(self.parameters, lr=LR)

    def update(self) -> None:
        """Clip the gradient where the task wants it, update the weights, average them."""
        with record_function("optimizer"):
            factor = 1.0
            if self.task.clip is not None:
                gradients = [p.grad for p in self.parameters if p.grad is not None]
                factor = clipping_factor(float(ops.gradient_norm(gradients)), self.task.clip)
            self.fused.step(gradient_factor=factor, averages=self.averages, average_weight=1 - EMA)


class TrainerStep:
    """The step of ``fastdiff.training.Trainer``, which fuses its network's layers by itself.

    Args:
        task: what is trained.
        size: images in a batch.
        module: diffusers' network, whose weights are copied.
        autocast: to bfloat16.
    """

    def __init__(self, task: Task, size: int, module: nn.Module, autocast: bool = False) -> None:
        network = UNet2DModel(**task.network.config)
        network.load_state_dict(module.state_dict())
        options = TrainingOptions(
            steps=ENDLESS, batch_size=size, lr=LR, lr_schedule="constant", ema=EMA,
            weight_decay=1e-2, grad_clip=task.clip or 0.0, bf16=autocast,
        )  # fmt: skip
        self.trainer = Trainer(
            network, task.schedule, task.images(), options, prediction=task.prediction
        )
        self.module = self.trainer.network

    def loss(self, batch: Batch) -> Tensor:
        """The trainer's loss of a batch."""
        weights = torch.ones(len(batch.t), dtype=torch.float64)
        return self.trainer.loss(
            batches.Batch(batch.x0, batch.labels, batch.t, weights, batch.noise)
        )

    def __call__(self) -> None:
        """Take a step on a new batch."""
        self.trainer.step()
