"""Training of diffusion models, and of classifiers for guidance."""

from __future__ import annotations

from fastdiff.common.world import World, process_group
from fastdiff.nn.image_unet import make_karras_unet, make_unet
from fastdiff.training.trainer import Trainer, make_diffusion
from fastdiff.training.training_options import (
    LR_SCHEDULES,
    OPTIMIZERS,
    SNAPSHOT_DTYPES,
    TIMESTEP_SAMPLERS,
    WEIGHTINGS,
    TrainingOptions,
    recorded_options,
)

__all__ = [
    "LR_SCHEDULES", "OPTIMIZERS", "SNAPSHOT_DTYPES", "TIMESTEP_SAMPLERS", "WEIGHTINGS", "Trainer",
    "TrainingOptions", "World", "make_diffusion", "make_karras_unet", "make_unet", "process_group",
    "recorded_options",
]  # fmt: skip
