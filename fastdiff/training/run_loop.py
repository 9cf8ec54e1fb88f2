"""The loop around the steps of a training run: checkpoints, sample grids, signals, observers."""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fastdiff.common.errors import UnwritableError
from fastdiff.common.machine_facts import peak_memory
from fastdiff.common.world import World
from fastdiff.data.training_images import TrainingImages
from fastdiff.diffusion import Diffusion
from fastdiff.training.averages import Averages
from fastdiff.training.micro_batches import MicroBatches
from fastdiff.training.observers import Observer, Observers, RunStart, StepRecord
from fastdiff.training.run_folder import observers_of_folder
from fastdiff.training.run_lock import claim
from fastdiff.training.session import Dispensable, deferred_signals
from fastdiff.training.snapshots import SnapshotKeeper
from fastdiff.training.training_bar import ProgressBar
from fastdiff.training.training_options import TrainingOptions
from fastdiff.training.validation import ValidationLoss


class Steps(Protocol):
    """What the loop needs of ``fastdiff.training.Trainer``, which describes each of these."""

    options: TrainingOptions
    world: World
    out: Path | None
    data: TrainingImages
    diffusion: Diffusion
    parameters: list[nn.Parameter]
    averages: Averages
    micro_batches: MicroBatches
    validation: ValidationLoss | None
    finished_steps: int
    gradient_norm: float | None
    refusal: dict[str, Any] | None

    def step(self) -> float:
        """Train on the next batch; the loss."""

    def save(self) -> None:
        """Write a checkpoint."""

    def preview(self) -> Any:
        """A grid of samples."""

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""

    def validation_losses(self) -> dict[str, Any]:
        """The losses of the images to validate with, by name."""


class RunLoop:
    """Takes a trainer to its last step; see ``Trainer.run``.

    Args:
        trainer: takes the steps.
        progress: show a progress bar on standard error.
        observers: to tell of steps, grids and checkpoints, besides those of the run's folder.
    """

    def __init__(self, trainer: Steps, progress: bool, observers: Sequence[Observer]) -> None:
        self.trainer, self.options, self.world = trainer, trainer.options, trainer.world
        self.dispensable = Dispensable()
        own: list[Observer] = []
        if self.world.first:
            own = [ProgressBar(progress), *observers_of_folder(trainer.out)]
        takes_part = self.world.first or self.options.shard  # in gathering averages
        if takes_part and trainer.out is not None and self.options.ema_std:
            own.append(SnapshotKeeper(trainer.out, trainer.averages, self.options, self.world))
        self.watchers = Observers([*own, *observers], self.dispensable)

    def run(self) -> signal.Signals | None:
        """Train to the last step or a signal, which is returned."""
        out, done = self.trainer.out, self.trainer.finished_steps
        claimed: AbstractContextManager[None] = nullcontext()
        if out is not None and self.world.first:
            claimed = claim(out, done, self.options.keep)
        watched = self.watchers.watching(run_start(self.trainer))
        # Signals wait for the observers' end too: when a process of the run is lost, torchrun's
        # signal would otherwise end the others before they have said so.
        with deferred_signals() as caught, claimed, watched:
            ended_by = self._train(caught)
        return signal.Signals(ended_by) if ended_by else None

    def _train(self, caught: list[signal.Signals]) -> int:
        """Train to the last step, or until a signal is caught; the signal, or 0."""
        options, trainer, watchers = self.options, self.trainer, self.watchers

        def signalled() -> int:
            # A signal reaches some processes a step earlier than others.
            return self.world.largest(*caught, 0)

        stop = signalled()
        while trainer.finished_steps < options.steps and not stop:
            self._step()
            done = trainer.finished_steps
            last = done == options.steps
            if last or done % options.save_every == 0:
                self._try_to_save(warn=not last)
            grid = options.sample_every and done % options.sample_every == 0
            if grid and self._one_for_all(watchers.want_grids and not caught):
                with self.dispensable("sample grid"):
                    picture = trainer.preview()
                    if picture is not None:
                        watchers.grid(done, picture)
            stop = signalled()
        if stop and trainer.finished_steps % options.save_every:
            self._try_to_save(warn=False)
        trainer.save()
        return stop

    def _one_for_all(self, wanted: bool) -> bool:
        """Whether this process, or with shards, which all gather together, the first wants it."""
        if not self.options.shard:
            return wanted
        return bool(self.world.largest(self.world.first and wanted))

    def _try_to_save(self, *, warn: bool) -> None:
        """Write a checkpoint, and tell the watchers; go on if the file system refuses it."""
        done = self.trainer.finished_steps
        self.watchers.before_checkpoint(done)
        try:
            self.trainer.save()
        except UnwritableError as error:
            if warn and self.world.first:  # the last is tried again, and is then an error
                warnings.warn(
                    f"fastdiff: {error}; earlier checkpoints are kept, and training goes on to the "
                    "next one",
                    stacklevel=5,
                )
        else:
            self.watchers.checkpoint(done)

    def _step(self) -> None:
        """Train on the next batch, and tell the watchers, also of a step that ends the run."""
        trainer = self.trainer
        began, number = time.perf_counter(), trainer.finished_steps + 1
        loss = math.nan
        try:
            loss = trainer.step()
        finally:
            if trainer.finished_steps == number or trainer.refusal is not None:
                seconds = time.perf_counter() - began
                self.watchers.step(self._record(number, loss, seconds))

    def _record(self, step: int, loss: float, seconds: float) -> StepRecord:
        """What observers are told of a step."""
        trainer, every = self.trainer, self.options.validate_every
        values: dict[str, Any] = {"loss": loss, "lr": trainer.learning_rate(step - 1)}
        if trainer.gradient_norm is not None:
            values["gradient_norm"] = trainer.gradient_norm
        due = every and trainer.finished_steps == step and not step % every
        if trainer.validation is not None and due:  # by all processes, which share it
            with self.dispensable("validation loss"):
                values |= trainer.validation_losses()
        device, on_device = trainer.parameters[0].device, None
        if device.type == "cuda":
            on_device = torch.cuda.max_memory_allocated(device)
        return StepRecord(
            step, values, self.options.batch_size, seconds, trainer.micro_batches.waited,
            peak_memory(), on_device, trainer.refusal,
        )  # fmt: skip


def run_start(trainer: Steps) -> RunStart:
    """What a trainer tells observers of its run at the start."""
    device, data, diffusion = trainer.parameters[0].device, trainer.data, trainer.diffusion
    facts = {
        "options": asdict(trainer.options),
        "process": repr(diffusion.forward),
        "prediction": diffusion.prediction,
        "objective": diffusion.objective.name,
        "parameters": sum(p.numel() for p in trainer.parameters),
        "images": {
            "name": data.name,
            "count": len(data),
            "shape": list(data.shape),
            "classes": len(data.classes),
            "validation": 0 if trainer.validation is None else len(trainer.validation.images),
        },
        "processes": trainer.world.count,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    return RunStart(trainer.out, trainer.finished_steps, trainer.options.steps, facts)
