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


@dataclass(frozen=True, eq=False)
class ImageSet(TrainingImages):
    """Images of one size with their classes, in memory.

    Attributes:
        images: [N, C, S, S], uint8 in 0..255 or float32 in [-1, 1] (a warning tells of others); or
            signals [N, C, L] or videos [N, C, F, H, W].
        labels: class of each image, int64 [N], or None.
        classes: names of the classes; empty without labels.
        name: of the data set, which checkpoints record.
        flip: in training, mirror a random half of the images left to right.

    Raises:
        DataError: images or labels of another shape or dtype, values that are not finite, labels
            outside the classes.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    name: str = ""
    flip: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        square = len(shape) == 4 and shape[2] == shape[3]
        if not (square or len(shape) in (3, 5)) or 0 in shape:
            raise DataError(
                "images must have shape [N, C, S, S] with N >= 1, signals [N, C, L], videos "
                f"[N, C, F, H, W], got {shape}"
            )
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
