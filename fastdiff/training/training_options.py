"""The options of a training run: their checks, and how to read them from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastdiff import objectives
from fastdiff.checkpoints import checkpoint
from fastdiff.common.errors import CheckpointError, InputError
from fastdiff.losses import score_matching, weights
from fastdiff.training import power_function

SNAPSHOT_DTYPES = ("float32", "bfloat16", "float16")
SEVERAL = ("ema", "ema_std", "betas")  # options of several values
OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
LR_SCHEDULES = ("cosine", "linear", "constant", "rsqrt")
COOLED = ("constant", "rsqrt")  # schedules that do not end at 0 by themselves
ON_BAD_LOSS = ("stop", "skip")
ON_OOM = ("stop", "halve")
WEIGHTINGS = ("none", *weights.NAMES, *score_matching.WEIGHTINGS)
# Options of runs that began before there was the option, whose arithmetic may not change.
WITHOUT_RECORD = {"compile": False}
TIMESTEP_SAMPLERS = ("default", *objectives.TIMESTEPS)


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training run.

    Attributes:
        steps: total number of optimizer steps.
        batch_size: images per step, of all processes together.
        accumulate: number of micro-batches in which a process takes its share of a batch. It
            changes the result by rounding alone, apart from which values dropout drops, and needs
            the memory of one micro-batch.
        on_oom: what happens if there is no memory for a micro-batch: "stop" ends the run, "halve"
            repeats the step in micro-batches of half the size and goes on with them. Processes then
            exchange gradients after a step's last backward pass, not during it.
        shard: divide weights, their moments and averages among the processes, each of which keeps a
            part of them, see ``fastdiff.training.shards``. It takes several processes, and it is
            not for muon, which needs whole matrices, nor for ``on_oom`` "halve", since processes
            that gather weights together cannot repeat their steps one by one.
        optimizer: one of ``OPTIMIZERS``, see ``fastdiff.training.optimizers``. "muon" takes AdamW
            for what is not the weight of a hidden layer.
        lr: highest learning rate.
        lr_schedule: after the warm-up, "cosine" and "linear" fall to 0 at the last step, "constant"
            stays, and "rsqrt" falls with the inverse square root of the step.
        lr_reference: of rsqrt, the step after which it falls; 0 for that of the warm-up.
        cooldown: number of last steps in which the rate of "constant" and "rsqrt" falls to 0.
        warmup: number of first steps in which the learning rate rises linearly.
        ema: decays of the exponential moving averages of the weights, one number or several; at
            step s a decay is min(ema, (1 + s) / (10 + s)).
        ema_std: relative standard deviations of averages by a power function, see
            ``fastdiff.training.power_function``. The run's model is the first average of ``ema``,
            or without any the first of ``ema_std``; the others are kept beside it.
        snapshots: how many times, evenly over the run, the averages of ``ema_std`` are kept in the
            run's folder, from which averages of other lengths are made afterwards.
        snapshot_dtype: of their files, one of ``SNAPSHOT_DTYPES``.
        betas: decays of the moments of adamw, adam and of muon's AdamW.
        eps: added to the root of their second moment.
        momentum: of sgd and muon; None for 0.9 and 0.95.
        nesterov: whether sgd has Nesterov's momentum, as muon always has.
        weight_decay: of the optimizer; that of adam and sgd is part of the gradient.
        grad_clip: largest norm of the gradient; 0 for no limit.
        seed: of the images' order, the timesteps, the noise and dropout.
        bf16: run the model under bfloat16 autocast.
        gradient_checkpointing: keep only the blocks' inputs for the backward pass and compute the
            rest again: less memory, more time, the same results. It leaves the network to PyTorch,
            whatever ``compile`` says.
        label_dropout: probability with which a label is hidden, so that the model can be guided
            without a classifier. If above 0, the model must have an additional last class, which
            stands for "no class".
        self_condition: give the model its own estimate of x0 beside x_t (Chen et al. 2022,
            arXiv:2208.04202): half of a batch's images the estimate of a first pass without
            gradient, the others zeros. The model must have ``self_condition`` in its config.
        weighting: of the loss, see ``fastdiff.objectives.make``, or "none".
        timestep_sampler: how the times of a batch are sampled, see ``fastdiff.objectives.make``;
            "default" is the objective's default.
        channels_last: keep weights and images in channels_last memory format.
        compile: train a network of this library that is on a CPU through fused operations with
            gradients (``fastdiff.compiler.network.TrainedNetwork``), unless it is compiled already
            or in a wrapper, or something observes its layers, such as a hook.
        on_bad_loss: what becomes of a step whose loss or gradient is not finite, or whose loss is
            too high: "stop" ends the run, "skip" leaves the step out, so that it changes nothing.
        spike: a loss of more than ``spike`` times the median of the last 100 is too high; 0 for no
            limit.
        max_skips: number of steps in a row that are not left out, since the run does not recover.
        save_every: steps between checkpoints; the last step always has one.
        sample_every: steps between sample grids; 0 for no grids.
        validate_every: steps between validation losses, if the trainer has images for them; 0 for
            none.
        keep: number of the newest checkpoints to keep.

    Raises:
        InputError: a value outside its range.
    """

    steps: int = 3000
    batch_size: int = 64
    accumulate: int = 1
    on_oom: str = "stop"
    shard: bool = False
    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    lr_reference: int = 0
    cooldown: int = 0
    warmup: int = 100
    ema: float | tuple[float, ...] = (0.999,)
    ema_std: tuple[float, ...] = ()
    snapshots: int = 16
    snapshot_dtype: str = "float32"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    label_dropout: float = 0.0
    self_condition: bool = False
    weighting: str = "none"
    timestep_sampler: str = "default"
    channels_last: bool = True
    compile: bool = True
    on_bad_loss: str = "stop"
    spike: float = 0.0
    max_skips: int = 10
    save_every: int = 500
    sample_every: int = 500
    validate_every: int = 500
    keep: int = 2

    @property
    def decays(self) -> tuple[float, ...]:
        """The decays in ``ema``."""
        return self.ema if isinstance(self.ema, tuple) else (self.ema,)

    @property
    def null_class(self) -> bool:
        """Whether the model has a class for hidden labels."""
        return self.label_dropout > 0

    def __post_init__(self) -> None:
        for name in SEVERAL:  # one number, or what JSON makes of a tuple
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, Sequence) else (value,)
            object.__setattr__(self, name, values)
        for name in (
            "steps", "batch_size", "accumulate", "max_skips", "save_every", "keep", "snapshots"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) >= 2**31:
                raise InputError(f"{name} must be below 2**31, got {getattr(self, name)}")
        for name in (
            "warmup",
            "lr_reference",
            "cooldown",
            "weight_decay",
            "eps",
            "grad_clip",
            "seed",
            "sample_every",
            "validate_every",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise InputError(f"seed must be below 2**63, got {self.seed}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be positive, got {self.lr}")
        for decay in self.decays:
            if not 0 <= decay < 1:
                raise InputError(f"ema must lie in [0, 1), got {decay}")
        for std in self.ema_std:
            power_function.check_std(std)
        for name in ("ema", "ema_std"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"{name} has a value twice: {getattr(self, name)}")
        if not self.decays and not self.ema_std:
            raise InputError("ema and ema_std name no average; a run has at least one")
        if self.spike and not 1 < self.spike < math.inf:
            raise InputError(f"spike must be above 1, or 0 for no limit, got {self.spike}")
        if not 0 <= self.label_dropout < 1:
            raise InputError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("weighting", WEIGHTINGS),
            ("timestep_sampler", TIMESTEP_SAMPLERS),
            ("lr_schedule", LR_SCHEDULES),
            ("on_bad_loss", ON_BAD_LOSS),
            ("on_oom", ON_OOM),
            ("snapshot_dtype", SNAPSHOT_DTYPES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"unknown {name} {value!r}, wanted one of {', '.join(known)}")
        if self.shard and self.on_oom == "halve":
            raise InputError(
                "shard has no on_oom halve: a process that has no memory for its micro-batch no "
                "longer helps the others to gather weights; set accumulate"
            )
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        """InputError for options of the optimizer or the rate that do not fit each other."""
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.shard and self.optimizer == "muon":
            raise InputError(
                "shard is not for the optimizer muon, which needs whole matrices; wanted one of "
                f"{', '.join(name for name in OPTIMIZERS if name != 'muon')}"
            )
        if self.momentum is not None:
            if self.optimizer not in ("sgd", "muon"):
                raise InputError(f"momentum is of sgd and muon; {self.optimizer} has betas")
            if not 0 <= self.momentum < 1:
                raise InputError(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise InputError("nesterov is for the optimizer sgd with a momentum")
        if self.cooldown and self.lr_schedule not in COOLED:
            raise InputError(
                f"cooldown is for {' and '.join(COOLED)}; the schedule {self.lr_schedule} ends at 0"
            )
        if self.lr_reference and self.lr_schedule != "rsqrt":
            raise InputError(f"lr_reference is for rsqrt, and not for {self.lr_schedule}")
        if self.lr_schedule == "rsqrt" and not (self.lr_reference or self.warmup):
            raise InputError("rsqrt needs lr_reference, the step after which it falls, or warmup")


def recorded_options(facts: Mapping[str, Any], folder: Path) -> TrainingOptions:
    """The options of the run that wrote a checkpoint.

    Args:
        facts: from ``fastdiff.checkpoints.checkpoint.read_facts(folder)``.
        folder: the checkpoint, for the text of errors.

    Raises:
        CheckpointError: the options are missing or not valid.
    """
    known = {field.name for field in fields(TrainingOptions)}
    options = facts.get("options")
    unusable = f"{folder / checkpoint.TRAINING}: unusable options: {options!r}"
    if not isinstance(options, dict) or not set(options) <= known:
        raise CheckpointError(unusable)
    try:
        return TrainingOptions(**{**WITHOUT_RECORD, **options})
    except (TypeError, InputError) as error:
        raise CheckpointError(f"{unusable}: {error}") from None
