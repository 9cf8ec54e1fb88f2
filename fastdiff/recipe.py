"""What a training run is made of: its options, and a U-Net for its images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastdiff import checkpoint, objectives
from fastdiff.errors import CheckpointError, InputError
from fastdiff.losses import score_matching, weights
from fastdiff.nn import UNet2DModel

LR_SCHEDULES = ("cosine", "constant")
WEIGHTINGS = ("none", *weights.NAMES, *score_matching.WEIGHTINGS)
TIMESTEP_SAMPLERS = ("default", *objectives.TIMESTEPS)


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        steps: optimizer steps in all.
        batch_size: images a step.
        lr: highest learning rate of AdamW.
        lr_schedule: cosine falls to 0 at the last step, constant stays.
        warmup: steps over which the rate first rises linearly.
        ema: decay of the averaged weights; at step s it is min(ema, (1 + s) / (10 + s)).
        weight_decay: of AdamW.
        grad_clip: largest norm of the gradient; 0 leaves it alone.
        seed: of the order, the timesteps, the noise and dropout.
        bf16: run the model under bfloat16 autocast.
        label_dropout: share of the labels that are hidden, so that the model can be guided without
            a classifier; it then has one class more, the last, that stands for none.
        weighting: of the loss, see ``fastdiff.objectives.make``, or none.
        timestep_sampler: how times are drawn, likewise; default is the objective's own way.
        channels_last: keep weights and images in channels_last memory format.
        save_every: steps between checkpoints; one is written at the end in any case.
        sample_every: steps between sample grids; 0 for none.
        keep: newest checkpoints to keep.

    Raises:
        InputError: a value outside its range.
    """

    steps: int = 3000
    batch_size: int = 64
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    warmup: int = 100
    ema: float = 0.999
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    seed: int = 0
    bf16: bool = False
    label_dropout: float = 0.0
    weighting: str = "none"
    timestep_sampler: str = "default"
    channels_last: bool = True
    save_every: int = 500
    sample_every: int = 500
    keep: int = 2

    @property
    def null_class(self) -> bool:
        """Whether the model has a class for hidden labels."""
        return self.label_dropout > 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) >= 2**31:
                raise InputError(f"{name} must be below 2**31, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "grad_clip", "seed", "sample_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise InputError(f"seed must be below 2**63, got {self.seed}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must lie in [0, 1), got {self.ema}")
        if not 0 <= self.label_dropout < 1:
            raise InputError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        for name, known in (
            ("weighting", WEIGHTINGS),
            ("timestep_sampler", TIMESTEP_SAMPLERS),
            ("lr_schedule", LR_SCHEDULES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"unknown {name} {value!r}, wanted one of {', '.join(known)}")


def make_unet(
    image_size: int,
    channels: int = 1,
    num_classes: int = 0,
    *,
    widths: tuple[int, ...] = (32, 64, 64),
    layers_per_block: int = 2,
    attention: tuple[int, ...] = (1, 2),
    dropout: float = 0.0,
    learned_variance: bool = False,
) -> UNet2DModel:
    """A U-Net for images of one size, its weights drawn from torch's global generator.

    Args:
        image_size: height and width; divisible by 2 ** (number of levels - 1).
        channels: of the images.
        num_classes: classes to condition on; 0 for an unconditional model.
        widths: feature channels of each level, the resolution halving from one to the next.
        layers_per_block: residual blocks a level.
        attention: the levels with self-attention; 0 is the full resolution.
        dropout: in every residual block.
        learned_variance: return twice the channels, for the objectives hybrid and vlb.

    Raises:
        InputError: sizes that do not fit together.
    """
    levels = len(widths)
    if levels == 0 or min(widths) < 1 or layers_per_block < 1:
        raise InputError(f"widths and layers must be positive, got {widths} and {layers_per_block}")
    if image_size < 1 or image_size % 2 ** (levels - 1):
        raise InputError(
            f"{levels} levels halve the image {levels - 1} times: "
            f"its size must be divisible by {2 ** (levels - 1)}, got {image_size}"
        )
    wrong = [level for level in attention if not 0 <= level < levels]
    if wrong:
        raise InputError(f"attention level {wrong[0]} does not exist: there are 0..{levels - 1}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must lie in [0, 1), got {dropout}")
    kinds = ["AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(levels)]
    head_dim = math.gcd(32, *widths)
    groups = math.gcd(32, *(width // 4 or 1 for width in widths), *widths)  # of 4 channels or more
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels * (2 if learned_variance else 1),
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        down_block_types=tuple(kinds),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        norm_num_groups=groups,
        attention_head_dim=head_dim,
        dropout=dropout,
        num_class_embeds=num_classes or None,
    )


def recorded_options(facts: Mapping[str, Any], folder: Path) -> TrainingOptions:
    """The options in a checkpoint's training facts; CheckpointError if they are not usable."""
    known = {field.name for field in fields(TrainingOptions)}
    options = facts.get("options")
    unusable = f"{folder / checkpoint.TRAINING}: unusable options: {options!r}"
    if not isinstance(options, dict) or not set(options) <= known:
        raise CheckpointError(unusable)
    try:
        return TrainingOptions(**options)
    except (TypeError, InputError) as error:
        raise CheckpointError(f"{unusable}: {error}") from None
