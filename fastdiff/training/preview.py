"""Grids of samples that show how a training run is coming along."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.data import image_grid
from fastdiff.data.order import stream_generator

STEPS = 20  # of DDIM, for a model that is not trained for few
ROWS = 4  # without classes
CLASSES = 10  # of which a grid shows samples, at most


@torch.no_grad()
def preview(checkpoint: Checkpoint, columns: int = 8) -> Any:
    """A grid of samples of a model, a row for each of its first ten classes.

    The noise is a function of the checkpoint's seed, so grids of one run can be compared.

    Args:
        checkpoint: the model.
        columns: samples in a row.

    Returns:
        The grid, a PIL image.
    """
    diffusion = checkpoint.diffusion()
    if diffusion.objective.few_steps is None:
        steps = min(STEPS, diffusion.path.num_timesteps)
        sampler = diffusion.sampler("ddim", steps, grid="trailing")
    else:  # its own sampler and steps
        sampler = diffusion.sampler()
    shown = range(min(CLASSES, len(checkpoint.classes)))
    labels = [label for label in shown for _ in range(columns)] if checkpoint.classes else None
    samples = checkpoint.sample(
        sampler,
        labels=labels,
        count=None if labels else columns * ROWS,
        generator=stream_generator(checkpoint.seed, "preview", 0),
        progress=False,
    )
    names = [checkpoint.classes[label] for label in shown] if labels else None
    return image_grid.grid(samples, columns, labels=names)
