"""Images to train on, read from files and folders, and grids of images to look at."""

from __future__ import annotations

from fastdiff.data.datasets import (
    ImageSet,
    batch_indices,
    digits,
    folder,
    stream_generator,
    stream_seed,
)

__all__ = ["ImageSet", "batch_indices", "digits", "folder", "stream_generator", "stream_seed"]
