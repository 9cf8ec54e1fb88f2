"""Images to train on, in memory or read while training, and grids of images to look at."""

from __future__ import annotations

from fastdiff.data.datasets import (
    ImageSet,
    batch_indices,
    digits,
    folder,
    open_images,
    stream_generator,
    stream_seed,
)
from fastdiff.data.training_images import TrainingImages

__all__ = [
    "ImageSet", "TrainingImages", "batch_indices", "digits", "folder", "open_images",
    "stream_generator", "stream_seed",
]  # fmt: skip
