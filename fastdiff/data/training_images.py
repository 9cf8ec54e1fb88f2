"""What training needs of images, wherever they are: in memory, or in files read when wanted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.common.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import Self

HELD_OUT = 5  # of each class every fifth image is held out


class TrainingImages(ABC):
    """Images of one size, with their classes.

    What is random in a batch is drawn for the whole of it, and :meth:`read` reads any part of it,
    so that processes that share a batch get the images that one process gets. :meth:`prefetch`
    tells of what will be read later.

    Attributes:
        labels: class of each image, int64 [N], or None.
        classes: names of the classes; empty without labels.
        name: of the data set, which checkpoints record.
        flip: in training, mirror a random half of the images left to right.
        listing: a hash of the names of the files, or None for images that have none.
        sampled: a fingerprint is taken of some of the images, since reading all takes long.
        ahead: for how many batches it pays to call :meth:`prefetch` beforehand.
    """

    labels: Tensor | None
    classes: tuple[str, ...]
    name: str
    flip: bool
    listing: str | None = None
    sampled: bool = False
    ahead: int = 0

    @abstractmethod
    def __len__(self) -> int:
        """N, the number of images."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """C: 1 for grey images, 3 for colour images, others for latents."""

    @property
    @abstractmethod
    def size(self) -> int:
        """S, height and width; of signals their length, of videos the width."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (C, S, S), or (C, L) of signals, or (C, F, H, W) of videos."""
        return self.channels, self.size, self.size

    @property
    def pictures(self) -> bool:
        """Whether the samples can be shown: images of one or three channels."""
        return len(self.shape) == 3 and self.channels in (1, 3)

    @abstractmethod
    def read(
        self, indices: Tensor, mirrored: Tensor | None = None, corners: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Images float32 [B, C, S, S], pixels in [-1, 1], and labels int64 [B] for ``indices``.

        Of signals or videos [B, *shape], their last dimension being that which is mirrored.

        Args:
            indices: numbers of the images, int64 [B].
            mirrored: which of them to mirror left to right, bool [B]; None for none.
            corners: where each is cut, see :meth:`draw_corners`; None for the middle.

        Raises:
            DataError: an image cannot be read; the text names its file.
        """

    @abstractmethod
    def subset(self, indices: Tensor) -> Self:
        """The images at ``indices``, int64 [M], as a set of their own."""

    @abstractmethod
    def without_labels(self) -> Self:
        """The same images without labels, for unconditional training."""

    def place(self, index: int) -> str:
        """How a text names an image: its file, where there is one, or its number."""
        return str(index)

    def prefetch(self, indices: Tensor) -> None:  # noqa: B027 - most images need not be told
        """Begin to read images that will be wanted; this returns at once."""

    def draw_mirrored(self, count: int, generator: torch.Generator | None) -> Tensor | None:
        """Which of ``count`` images are mirrored, bool [count]; None, drawing nothing, unless
        ``flip``."""
        if not self.flip:
            return None
        return torch.rand(count, generator=generator, device="cpu") < 0.5

    def draw_corners(self, count: int, generator: torch.Generator | None) -> Tensor | None:
        """Where ``count`` images are cut, float32 [count, 2] in [0, 1): the top and left edge of
        the square, 0 for the first and 1 for the last place that there is. None, drawing nothing,
        where all images are cut in the middle."""
        return None

    def batch(
        self, indices: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What :meth:`read` gives for ``indices``, mirrored and cut at random as in training."""
        count = len(indices)
        mirrored = self.draw_mirrored(count, generator)
        return self.read(indices, mirrored, self.draw_corners(count, generator))

    def split(self) -> tuple[Self, Self | None]:
        """Split into images to train on, and the held-out images: every fifth of each class.

        Returns:
            Both sets; None in place of the second if no class has five images.

        Raises:
            DataError: there are no labels.
        """
        if self.labels is None:
            raise DataError("images without labels cannot be split by class")
        held_out = _held_out(self.labels)
        if not bool(held_out.any()):
            return self, None
        train, rest = (self.subset(chosen.nonzero().flatten()) for chosen in (~held_out, held_out))
        return train, rest


def mirror(x0: Tensor, mirrored: Tensor | None) -> Tensor:
    """Images [B, C, ..., S], those for which ``mirrored`` is true from right to left."""
    if mirrored is None:
        return x0
    return torch.where(mirrored.view(-1, *[1] * (x0.ndim - 1)), x0.flip(-1), x0)


def check_labels(labels: Tensor | None, classes: tuple[str, ...], count: int) -> None:
    """DataError unless there are ``count`` labels, int64, all of them numbers of classes."""
    if labels is None:
        if classes:
            raise DataError(f"classes {classes} are named, but there are no labels")
    elif (
        labels.shape != (count,)
        or labels.dtype != torch.int64
        or not 0 <= int(labels.min()) <= int(labels.max()) < len(classes)
    ):
        raise DataError(f"labels must be int64 of shape ({count},) in 0..{len(classes) - 1}")


def _held_out(labels: Tensor) -> Tensor:
    """Mask of the images that are every fifth of their class, bool [N]."""
    chosen = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in labels.unique().tolist():
        chosen[(labels == label).nonzero().flatten()[HELD_OUT - 1 :: HELD_OUT]] = True
    return chosen
