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
SEVERAL = ("ema", "ema_std")  # options of several values
LR_SCHEDULES = ("cosine", "constant")
ON_BAD_LOSS = ("stop", "skip")
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
        lr: highest learning rate of AdamW.
        lr_schedule: after the warm-up, "cosine" falls to 0 at the last step, "constant" stays.
        warmup: number of first steps in which the learning rate rises linearly.
        ema: decays of the exponential moving averages of the weights, one number or several; at
            step s a decay is min(ema, (1 + s) / (10 + s)).
        ema_std: relative standard deviations of averages by a power function, see
            ``fastdiff.training.power_function``. The run's model is the first average of ``ema``,
            or without any the first of ``ema_std``; the others are kept beside it.
        snapshots: how many times, evenly over the run, the averages of ``ema_std`` are kept in the
            run's folder, from which averages of other lengths are made afterwards.
        snapshot_dtype: of their files, one of ``SNAPSHOT_DTYPES``.
        weight_decay: of AdamW.
        grad_clip: largest norm of the gradient; 0 for no limit.
        seed: of the images' order, the timesteps, the noise and dropout.
        bf16: run the model under bfloat16 autocast.
        label_dropout: probability with which a label is hidden, so that the model can be guided
            without a classifier. If above 0, the model must have an additional last class, which
            stands for "no class".
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
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    warmup: int = 100
    ema: float | tuple[float, ...] = (0.999,)
    ema_std: tuple[float, ...] = ()
    snapshots: int = 16
    snapshot_dtype: str = "float32"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    seed: int = 0
    bf16: bool = False
    label_dropout: float = 0.0
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
            "weight_decay",
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
        for name in SEVERAL:
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"{name} has a value twice: {getattr(self, name)}")
        if not self.decays and not self.ema_std:
            raise InputError("ema and ema_std name no average; a run has at least one")
        if self.spike and not 1 < self.spike < math.inf:
            raise InputError(f"spike must be above 1, or 0 for no limit, got {self.spike}")
        if not 0 <= self.label_dropout < 1:
            raise InputError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        for name, known in (
            ("weighting", WEIGHTINGS),
            ("timestep_sampler", TIMESTEP_SAMPLERS),
            ("lr_schedule", LR_SCHEDULES),
            ("on_bad_loss", ON_BAD_LOSS),
            ("snapshot_dtype", SNAPSHOT_DTYPES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"unknown {name} {value!r}, wanted one of {', '.join(known)}")


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
