"""Training images that are read from their files when they are wanted."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from fastdiff.common.errors import DataError
from fastdiff.data.image_grid import from_uint8
from fastdiff.data.image_reader import ImageReader
from fastdiff.data.training_images import TrainingImages, mirror

AHEAD = 4  # batches that are read while the model is busy


class LazyImages(TrainingImages):
    """Images of a source that are read by processes of their own while the model trains.

    In memory there are the images that the reader's cache holds, and those of the next batches.

    Args:
        reader: of the images.
        flip: in training, mirror a random half of the images left to right.
        scale: multiplies latents, for example 0.18215 for those of Stable Diffusion's encoder.

    Raises:
        DataError: ``flip``, or another crop than the middle, for latents: the latent of a mirrored
            image is not the mirrored latent of the image.
    """

    sampled = True

    def __init__(self, reader: ImageReader, *, flip: bool = False, scale: float = 1.0) -> None:
        source = reader.source
        if source.latents and flip:
            raise DataError(
                f"the images of {source.name!r} are latents, which flip (--flip) cannot mirror: "
                "the latent of a mirrored image is another; encode mirrored images as well"
            )
        if not source.latents and scale != 1:
            raise DataError(
                f"a scale (--latent-scale) is for latents; the images of {source.name!r} are pixels"
            )
        self.reader, self.flip, self.scale = reader, flip, scale
        self.name, self.classes, self.labels = source.name, source.classes, source.labels
        self.listing = source.listing
        self.ahead = AHEAD if reader.workers.count else 0
        self._chosen: Tensor | None = None  # numbers in the source, of a subset

    def __len__(self) -> int:
        return len(self.reader.source) if self._chosen is None else len(self._chosen)

    @property
    def channels(self) -> int:
        """C: 1 for grey images, 3 for colour images, others for latents."""
        return self.reader.source.channels(self.reader.reading)

    @property
    def size(self) -> int:
        """S, height and width."""
        return self.reader.reading.size

    def read(
        self, indices: Tensor, mirrored: Tensor | None = None, corners: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Images and labels, as the base class says."""
        images = self.reader.images(self._numbers(indices))
        places = [(0.5, 0.5)] * len(images) if corners is None else corners.tolist()
        cut = [_square(image, *place) for image, place in zip(images, places, strict=True)]
        size, channels = self.size, self.channels
        values = np.stack(cut) if cut else np.empty((0, size, size, channels), np.uint8)
        x0 = torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()
        x0 = from_uint8(x0) if x0.dtype == torch.uint8 else x0.float() * self.scale
        return mirror(x0, mirrored), None if self.labels is None else self.labels[indices]

    def prefetch(self, indices: Tensor) -> None:
        """Begin to read images that will be wanted; this returns at once."""
        if self.ahead:
            self.reader.prefetch(self._numbers(indices))

    def draw_corners(self, count: int, generator: torch.Generator | None) -> Tensor | None:
        """Where ``count`` images are cut, as the base class says, for ``crop="random"``."""
        if self.reader.reading.crop != "random":
            return None
        return torch.rand(count, 2, generator=generator, device="cpu")

    def place(self, index: int) -> str:
        """How a text names an image: its file."""
        return self.reader.source.place(int(self._numbers(torch.tensor([index]))[0]))

    def subset(self, indices: Tensor) -> LazyImages:
        """The images at ``indices``, int64 [M], which are read by the same reader."""
        return self._with(
            torch.tensor(self._numbers(indices), dtype=torch.int64, device="cpu"),
            None if self.labels is None else self.labels[indices],
            self.classes,
        )

    def without_labels(self) -> LazyImages:
        """The same images without labels, for unconditional training."""
        return self._with(self._chosen, None, ())

    def _with(
        self, chosen: Tensor | None, labels: Tensor | None, classes: tuple[str, ...]
    ) -> LazyImages:
        other = copy.copy(self)
        other._chosen, other.labels, other.classes = chosen, labels, classes
        return other

    def _numbers(self, indices: Tensor) -> list[int]:
        """The numbers of images in the source; IndexError for one that there is not."""
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"images {indices.tolist()} of {len(self)}")
        numbers: list[int] = (indices if self._chosen is None else self._chosen[indices]).tolist()
        return numbers


def _square(image: np.ndarray, down: float, right: float) -> np.ndarray:
    """The square [S, S, C] of an image [H, W, C] of which S is the shorter side.

    ``down`` and ``right`` in [0, 1) choose among its whole places, 0 the first and near 1 the last.
    """
    height, width = image.shape[:2]
    size = min(height, width)
    if height == width:
        return image
    top, left = int(down * (height - size + 1)), int(right * (width - size + 1))
    return image[top : top + size, left : left + size]
