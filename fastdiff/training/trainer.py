"""The trainer of diffusion models, for every objective of ``fastdiff.objectives``.

All random numbers of step s come from generators seeded with (seed, s), and the images' order
depends on (seed, s) alone. An interrupted and resumed run therefore gives bit for bit the result of
a run without interruption.
"""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import checkpoint, forward_process, resumable
from fastdiff.checkpoints.resumable import Resumable
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import CheckpointError, InputError
from fastdiff.common.world import present
from fastdiff.data.order import Lookahead
from fastdiff.data.training_images import TrainingImages
from fastdiff.nn import ImageNetwork
from fastdiff.nn.image_unet import make_unet
from fastdiff.nn.wrappers import is_distributed, plain_name, unwrapped
from fastdiff.objectives import Forward, Objective
from fastdiff.ops.profiling import span
from fastdiff.sampling.terminal_snr import warn_of_image_at_the_end
from fastdiff.training import batches, distillation, optimizers, shards, training_state
from fastdiff.training.adamw import clipping_factor
from fastdiff.training.averages import Averages
from fastdiff.training.batches import Batch, Draws
from fastdiff.training.fingerprint import fingerprint, of_resumed
from fastdiff.training.learned_process import LearnedProcess
from fastdiff.training.learning_rate import learning_rate
from fastdiff.training.loss_guard import Fault, LossGuard
from fastdiff.training.micro_batches import MicroBatches
from fastdiff.training.model_fit import called, check_fit, make_diffusion
from fastdiff.training.observers import Observer
from fastdiff.training.preview import preview
from fastdiff.training.run_lock import set_aside
from fastdiff.training.run_loop import RunLoop
from fastdiff.training.training_options import LR_SCHEDULES, TrainingOptions, recorded_options
from fastdiff.training.validation import of_run

__all__ = [
    "LR_SCHEDULES", "Trainer", "TrainingOptions", "make_diffusion", "make_unet", "recorded_options",
]  # fmt: skip


class Trainer:
    """Trains a model on images, and averages its weights.

    Args:
        model: predicts [N, C, S, S] from (x_t, t[, class_labels]), or [N, 2 C, S, S] with a
            learned variance; trained in place. It may be compiled, or inside a wrapper such as
            DataParallel or DistributedDataParallel: checkpoints hold the bare network, with its own
            parameter names. DistributedDataParallel gives gradients the strides that the weights
            had when it was constructed, so the trainer does not change the memory format of its
            weights; convert the network before wrapping it.
        forward: the forward process, a schedule or an SDE; a ``sde.LearnedLogSNR`` is trained, too.
        data: images, and labels if the model is class-conditional.
        options: of the training; None for the defaults.
        prediction: what the model predicts, see ``fastdiff.objectives.make``.
        objective: what the model is trained for, see ``fastdiff.objectives.make``; or an objective,
            as ``fastdiff.training.distillation`` makes; None for the default of the process.
        variance: of the reverse steps, see ``fastdiff.objectives.make``.
        levels: of noise, for the objective ncsn, see ``fastdiff.objectives.make``.
        validation: images whose loss is measured every ``options.validate_every`` steps of
            :meth:`run`, of the size and the classes of ``data``; None for no validation.
        out: folder for checkpoints, sample grids and losses.jsonl; None writes nothing.
        record: JSON values of the caller to keep in the checkpoints.

    Attributes:
        diffusion: the model with its process and its objective.
        model: the given model, in training mode.
        network: the given model without torch's wrappers.
        averages: of the weights.
        process: what is learned of the forward process.
        shards: of the network, which then is one of ``torch.distributed.fsdp.fully_shard``; None
            without ``options.shard``. With them all processes must call what reads averages, since
            they gather these; only the first process has them.
        finished_steps: number of steps done, those that were left out included.
        guard: judges losses and gradients, and counts the steps that were left out.
        refusal: of the last step, if it updated nothing: the reason, ``fault``, and the numbers of
            the ``images`` to blame with their ``places``; else None.
        gradient_norm: of the last step, before clipping; None if it was not computed.

    Raises:
        InputError: the model, the data, the process, the processes and the options do not fit
            together, or ``out`` holds checkpoints of an earlier run, which :meth:`resume`
            continues.

    Example:
        >>> trainer = Trainer(model, fastdiff.schedules.cosine(), data, TrainingOptions(steps=100))
        >>> losses = [trainer.step() for _ in range(100)]
        >>> trained = trainer.checkpoint()
    """

    def __init__(
        self,
        model: ImageNetwork,
        forward: Forward,
        data: TrainingImages,
        options: TrainingOptions | None = None,
        *,
        prediction: str = "eps",
        objective: str | Objective | None = None,
        variance: str | None = None,
        levels: int | None = None,
        validation: TrainingImages | None = None,
        out: str | Path | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = options or TrainingOptions()
        self.diffusion = make_diffusion(
            model, forward, self.options, prediction, objective, variance, levels
        )
        self.network: ImageNetwork = unwrapped(model)
        check_fit(self.network, data, self.options, self.diffusion.objective.learned)
        warn_of_image_at_the_end(self.diffusion.path)
        if out is not None:
            forward_process.describe(forward)
        if out is not None and checkpoint.newest(out) is not None:
            raise InputError(
                f"{out} holds checkpoints of an earlier run; resume it, or choose another folder"
            )
        if out is not None and self.options.sample_every and not data.pictures:
            raise InputError(
                "sample grids show images of 1 or 3 channels, a sample of the data has the shape "
                f"{data.shape}; set sample_every to 0"
            )
        self.data, self.world = data, present()
        if self.options.batch_size < self.world.count * self.options.accumulate:
            raise InputError(
                f"a batch of {self.options.batch_size} images cannot be divided among "
                f"{self.world.count} processes in {self.options.accumulate} micro-batches"
            )
        self.memory_format = (
            torch.channels_last if self.options.channels_last else torch.contiguous_format
        )
        self.model = model.train()
        if not is_distributed(model):
            kept = torch.contiguous_format if self.options.shard else self.memory_format
            model.to(memory_format=kept)  # type: ignore[call-overload]
        self.world.as_first([*self.network.parameters(), *self.network.buffers()])
        self.shards = shards.divided(model, self.network, self.options, self.world)
        self.averages = Averages(self.network, self.options, self.shards)
        if self.options.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.parameters = list(self.network.parameters())
        named = self._named_parameters()
        self.optimizer, self._updated = optimizers.make(self.options, named), [p for _, p in named]
        self.process = LearnedProcess(forward, self.options, self.world)
        self.validation = of_run(
            self.diffusion.objective, validation, data, self.options, self.memory_format
        )
        self.finished_steps = 0
        self.guard = LossGuard(self.options, tells=self.world.first)
        self.refusal: dict[str, Any] | None = None
        self.micro_batches = MicroBatches(
            [*self.parameters, *self.process.parameters],
            lambda: called(self.model, self.options),
            lambda batch: self.losses(batch),
            lambda draws: self.batch(draws),
            self.world,
            self.options,
            self.shards,
        )
        self.gradient_norm: float | None = None
        self.out = None if out is None else Path(out).absolute()
        self.record = dict(record or {})

    @classmethod
    def resume(
        cls,
        out: str | Path,
        data: TrainingImages,
        options: TrainingOptions | None = None,
        *,
        validation: TrainingImages | None = None,
        device: str | torch.device = "cpu",
        record: Mapping[str, Any] | None = None,
        found: Resumable | None = None,
        teacher: str | Path | None = None,
    ) -> Trainer:
        """Continue a run from its newest whole checkpoint.

        A newer one that is damaged is told of by a warning, and gets a name by which it is no
        longer found. The model is the bare network; to compile it again, call
        ``trainer.model.compile()``.

        Args:
            out: the run's folder.
            data: the images and labels of the run. They may be at another place: their content is
                compared, up to the rounding of another decoder.
            options: None for those of the checkpoint.
            validation: as of :class:`Trainer`; a resumed run must be given it again.
            device: where to train.
            record: None for that of the checkpoint.
            found: the newest whole checkpoint, if the caller has read it already by
                ``resumable.find(out)``.
            teacher: where the teacher of a distillation is now; None for where it was.

        Raises:
            CheckpointError: there is no checkpoint in ``out``, or it cannot be resumed, or its
                teacher is not where it was.
            DataError: the images are not those of the run.
        """
        found = resumable.find(out) if found is None else found
        folder, saved, tensors, facts = found.folder, found.saved, found.tensors, found.facts
        path = folder / checkpoint.TRAINING
        objective = distillation.restored(facts, saved, path, device, teacher)
        made = isinstance(objective, Objective)
        trainer = cls(
            copy.deepcopy(saved.model).to(device),
            saved.forward,
            data,
            options or recorded_options(facts, folder),
            prediction=saved.prediction,
            objective=objective,
            variance=None if made else saved.variance,
            levels=None if made else saved.levels,
            validation=validation,
            record=facts.get("record", {}) if record is None else record,
        )
        trainer.fingerprint = of_resumed(data, saved, facts, path)
        try:
            trainer.diffusion.objective.load_state_dict(facts.get("timesteps", {}))
            trainer.guard.load_state_dict(facts.get("losses", {}))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        trainer._restore(tensors, saved, folder / checkpoint.STATE)
        resumable.check_agreed(found, trainer.world)
        if found.damaged:
            trainer.world.by_first(lambda: set_aside(out, found.damaged))
        trainer.out = Path(out).absolute()
        return trainer

    def step(self) -> float:
        """Train on the next batch and return its loss.

        torch's global generators are seeded for the step's dropout and restored afterwards.

        Raises:
            TrainingError: the loss or the gradient is not finite, or the loss is too high, and the
                options do not leave such a step out; the model is not changed.
        """
        step, self.refusal, self.gradient_norm = self.finished_steps, None, None
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        with span("train step"), self.world.lost_as_errors():
            value = self._step(step)
        self.finished_steps += 1
        return value

    def _step(self, step: int) -> float:
        self._lookahead(step)
        draws = self.draw(step)
        losses = self.micro_batches.gradient(step, draws)
        weighted = draws.weights.to(losses.dtype) * losses
        value = float(weighted.mean())
        fault = self.guard.judge_loss(value)
        if fault is None:
            with span("optimizer"):
                norm = self.gradient_norm = shards.gradient_norm(self.parameters, self.shards)
                finite = self.process.gradient_is_finite()
                fault = self.guard.judge_gradient(norm if finite else math.nan)
                if fault is None:
                    self._update(norm, step)
        if fault is None:
            self.guard.accept(value)
            self.diffusion.objective.observe(draws.t, losses)
        else:
            self._refuse(step, fault, draws, weighted)
        return value

    def _update(self, norm: float, step: int) -> None:
        """Update weights, moments and averages by gradients of a norm."""
        clip = self.options.grad_clip
        self.optimizer.step(
            gradient_factor=clipping_factor(norm, clip) if clip else 1.0,
            averages=self.averages.first,
            average_weight=self.averages.first_weight(step),
        )
        self.averages.move_others(self._updated, step)
        self.process.update(self.learning_rate(step))
        self.network.normalise_weights()

    def _refuse(self, step: int, fault: Fault, draws: Draws, losses: Tensor) -> None:
        """Leave a step out, or raise the error that ends the run, with the images to blame."""
        indices: list[int] = draws.indices.tolist()
        each = zip(indices, losses.tolist(), strict=True)
        blamed = [index for index, loss in each if fault.blames(loss)] or indices
        places = [self.data.place(index) for index in blamed]
        self.refusal = {"fault": fault.reason, "images": blamed, "places": places}
        self.guard.refuse(step + 1, fault, places)

    def losses(self, batch: Batch) -> Tensor:
        """The objective's loss of each image of a batch, without its weight, [N]."""

        objective = self.diffusion.objective
        # A teacher is told the labels, too.
        cond = {} if batch.labels is None else {"class_labels": batch.labels}

        def model(
            x_t: Tensor, t: Tensor, *, class_labels: Tensor | None = None, **estimate: Tensor
        ) -> Any:
            # The pass that makes an estimate is without gradient and may be of fewer images:
            # DistributedDataParallel, which exchanges gradients, has no part in it.
            first = batch.estimated is not None and not torch.is_grad_enabled()
            called = self.network if first else self.micro_batches.model
            with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.options.bf16):
                return called(x_t, t, class_labels, **estimate)

        used: Any = model
        if batch.estimated is not None:
            used = objective.aided(model, batch.t, batch.estimated)
        return objective.losses(used, batch.x0, batch.t, batch.noise, **cond)

    def loss(self, batch: Batch) -> Tensor:
        """The weighted mean of :meth:`losses`, a scalar."""
        losses = self.losses(batch)
        return (batch.weights.to(losses.device, losses.dtype) * losses).mean()

    def learning_rate(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        return learning_rate(self.options, step)

    def run(
        self, *, progress: bool = True, observers: Sequence[Observer] = ()
    ) -> signal.Signals | None:
        """Train to the last step, with checkpoints, sample grids and logs in ``out``.

        SIGINT (Ctrl-C), SIGTERM or SIGHUP ends the run after the running step, with a checkpoint; a
        second signal ends it at once, without a checkpoint. Of several processes all end after the
        same step, whichever the signal reached. If a line of a log or a sample grid cannot be made
        or written, the run goes on without it, with a warning the first time. If a checkpoint
        cannot be written, the earlier ones are kept and the run goes on to the next, with a
        warning; the last one is an error.

        Args:
            progress: show a progress bar on standard error.
            observers: further objects to tell of steps, grids and checkpoints.

        Returns:
            The signal that ended the run, or None after the last step.

        Raises:
            TrainingError: the loss or the gradient is not finite, or the loss is too high, and the
                options do not leave such steps out.
            CheckpointError: the last checkpoint could not be written.
            LockedError: another process trains in ``out``.
            InputError: no file can be written in ``out``, or another process has taken the run
                further since this trainer was made.
        """
        return RunLoop(self, progress, observers).run()

    def validation_losses(self) -> dict[str, Any]:
        """The losses of the images to validate with, by the names that logs have for them.

        ``validation_loss`` is that of the averaged model, ``validation_loss_raw`` that of the model
        itself, and ``validation_loss_parts`` that of the averaged model in each quarter of the
        times, from the least noise to the most. With ``options.shard`` all processes must call
        this, and it is empty in all but the first.
        """
        if self.validation is None:
            raise ValueError("the trainer was given no images to validate with")
        averaged, raw = self.ema, self.network
        if self.shards is not None:  # all is gathered before the first process does what can fail
            raw = self.shards.network(self.shards.parameters)
        return self.validation.of_both(averaged, raw) if self._has_whole else {}

    @property
    def _has_whole(self) -> bool:
        """Whether this process has what averages are read from."""
        return self.shards is None or self.world.first

    def checkpoint(self) -> Checkpoint:
        """The averaged model, not a copy: further training changes it."""
        return Checkpoint(
            self.ema,
            self.process.now(),
            self.diffusion.prediction,
            classes=self.data.classes,
            step=self.finished_steps,
            seed=self.options.seed,
            dataset=self.data.name,
            null_class=self.options.null_class,
            objective=self.diffusion.objective.name,
            variance=self.diffusion.objective.variance,
            levels=self.diffusion.objective.levels,
            few_steps=self.diffusion.objective.few_steps,
            weights=self.averages.profiles[0].name,
        )

    @property
    def ema(self) -> ImageNetwork:
        """The network with averaged weights, the first of ``averages``, in eval mode."""
        return self.averages.network

    def save(self) -> None:
        """Write a checkpoint into ``out``, unless this step has one, and delete the oldest.

        Of several processes the first writes, and the others wait; all must call this.
        """
        if self.out is None:
            return
        out, folder = self.out, checkpoint.step_folder(self.out, self.finished_steps)
        contents: dict[str, Any] = {}
        # Shards are gathered by all, if the first process, whose answer counts, finds no folder.
        if self.shards is not None and self.world.largest(self.world.first and not folder.exists()):
            contents = self._contents()

        def write() -> None:
            if not folder.exists():
                checkpoint.save(folder=folder, **(contents or self._contents()))
            checkpoint.prune(out, self.options.keep)

        self.world.by_first(write)

    def _contents(self) -> dict[str, Any]:
        """What a checkpoint is made of, by the names of ``checkpoint.save``."""
        return {
            "checkpoint": self.checkpoint(),
            "state": self._state(),
            "averages": self.averages.other_states(),
        }

    def preview(self, columns: int = 8) -> Any:
        """A labelled grid of samples from the averaged model; its noise is the same every time.

        With ``options.shard`` all processes must call this, and it is None in all but the first.
        """
        whole = self.checkpoint()
        return preview(whole, columns) if self._has_whole else None

    def draw(self, step: int) -> Draws:
        """What is drawn for the whole batch of step ``step``."""
        return batches.draw(self.data, self.diffusion.objective, self.options, step)

    def batch(self, draws: Draws) -> Batch:
        """The batch of ``draws``, or of a part of them, on the model's device."""
        return batches.read(self.data, draws, self.parameters[0].device, self.memory_format)

    @cached_property
    def _lookahead(self) -> Lookahead:
        """Tells the images which of them this process will read in the next steps."""
        return batches.lookahead(self.data, self.options, self.world)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the images, by which a resumed run recognises them."""
        return fingerprint(self.data)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and JSON values from which :meth:`resume` continues."""
        facts = {
            "step": self.finished_steps,
            "images": len(self.data),
            "fingerprint": self.fingerprint,
            "options": asdict(self.options),
            "record": self.record,
            "timesteps": self.diffusion.objective.state_dict(),
            "losses": self.guard.state_dict(),
        }
        plan = self.diffusion.objective.plan
        if plan is not None and plan.record is not None:
            facts["objective"] = dict(plan.record)
        tensors = training_state.state_tensors(self._named_parameters(), self.optimizer)
        tensors = tensors if self.shards is None else self.shards.gathered(tensors)
        return tensors | self.process.tensors(), facts

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What this process updates of the parameters, with their names in files."""
        if self.shards is not None:
            return self.shards.named
        return [(plain_name(name), p) for name, p in self.network.named_parameters()]

    def _restore(self, tensors: Mapping[str, Tensor], saved: Checkpoint, path: Path) -> None:
        """Set weights, averages, optimizer and step from a checkpoint and its training state.

        ``path`` is the file of ``tensors``, for the text of errors.
        """
        own: Mapping[str, Tensor] = saved.model.state_dict()
        states = {self.averages.profiles[0].name: own}
        for profile in self.averages.profiles[1:]:
            states[profile.name] = checkpoint.read_weights(path.parent, profile.name, own)
        self.averages.restore(states)
        if self.shards is not None:
            tensors = {key: self.shards.part(key, value) for key, value in tensors.items()}
        updates = saved.step - self.guard.skipped
        training_state.restore(self._named_parameters(), self.optimizer, tensors, updates, path)
        self.process.restore(tensors, updates, path)
        self.finished_steps = saved.step
