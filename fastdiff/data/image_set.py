"""Training images in memory."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdiff.common.errors import DataError
from fastdiff.data.image_grid import from_uint8
from fastdiff.data.training_images import TrainingImages, check_labels, mirror

_SHAPES = {1: "[N, C, L]", 2: "[N, C, S, S]", 3: "[N, C, F, H, W]"}


@dataclass(frozen=True, eq=False)
class ImageSet(TrainingImages):
    """Images of one size with their classes, in memory.

    Attributes:
        images: [N, C, S, S], uint8 in 0..255 or float32 in [-1, 1] (a warning tells of others); or
            signals or videos, as ``dimensions`` says.
        labels: class of each image, int64 [N], or None.
        classes: names of the classes; empty without labels.
        name: of the data set, which checkpoints record.
        flip: in training, mirror a random half of the images left to right.
        dimensions: 2 for images, 1 for signals [N, C, L], 3 for videos [N, C, F, H, W].

    Raises:
        DataError: images or labels of another shape or dtype, values that are not finite, labels
            outside the classes.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    name: str = ""
    flip: bool = False
    dimensions: int = 2

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        wanted = _SHAPES.get(self.dimensions)
        if wanted is None:
            raise DataError(f"dimensions must be 1, 2 or 3, got {self.dimensions}")
        square = self.dimensions != 2 or shape[2:3] == shape[3:]
        if len(shape) != 2 + self.dimensions or shape[0] == 0 or not square:
            raise DataError(f"images must have shape {wanted} with N >= 1, got {shape}")
        if self.images.dtype not in (torch.uint8, torch.float32):
            raise DataError(f"images must be uint8 or float32, got {self.images.dtype}")
        if self.images.dtype == torch.float32:
            low, high = (float(edge) for edge in self.images.aminmax())  # NaN if there is one
            if not (math.isfinite(low) and math.isfinite(high)):
                raise DataError("float32 images must be finite, got NaN or infinity")
            if low < -1 or high > 1:
                warnings.warn(
                    f"fastdiff: float32 images should lie in [-1, 1], got {low:g} to {high:g}; "
                    "pass pixels of 0 to 255 as uint8, or scale them",
                    stacklevel=3,  # past the dataclass's __init__
                )
        check_labels(self.labels, self.classes, shape[0])

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """C: 1 for grey images, 3 for colour images."""
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """S, height and width; of signals their length, of videos the width."""
        return self.images.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, as the base class says."""
        return tuple(self.images.shape[1:])

    def without_labels(self) -> ImageSet:
        """The same images without labels, for unconditional training."""
        return replace(self, labels=None, classes=())

    def subset(self, indices: Tensor) -> ImageSet:
        """A copy of the images at ``indices``, int64 [M]."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, images=self.images[indices], labels=labels)

    def read(
        self, indices: Tensor, mirrored: Tensor | None = None, corners: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Images and labels, as the base class says; the images are square, nothing is cut."""
        x0 = self.images[indices]
        if x0.dtype == torch.uint8:
            x0 = from_uint8(x0)
        return mirror(x0, mirrored), None if self.labels is None else self.labels[indices]
