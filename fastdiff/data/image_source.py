"""What every format of a data set gives: images by their number, read in any order."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.image_file import Depth, Reading


class ImageSource(ABC):
    """Images of a format, found but not read.

    A source is used by several processes: it opens its files where it reads them.

    Attributes:
        name: of the data set.
        classes: names of the classes; empty without labels.
        labels: class of each image, int64 [N], or None.
        latents: the values are those of an encoder, not pixels.
        listing: a hash of the names of what was found, in their order; None without names.
    """

    name: str
    classes: tuple[str, ...] = ()
    labels: Tensor | None = None
    latents: bool = False
    listing: str | None = None

    @abstractmethod
    def __len__(self) -> int:
        """N, the number of images."""

    @abstractmethod
    def read(self, index: int, reading: Reading) -> tuple[np.ndarray, Depth | None]:
        """One image, [H, W, C], uint8 pixels or floating-point latents, brought to size.

        Returns:
            The image, and the depth of a file with more than 8 bits a value, else None.

        Raises:
            DataError: the image cannot be read; the text is :meth:`place` and the reason.
        """

    @abstractmethod
    def place(self, index: int) -> str:
        """Where an image is, for the text of errors: its file, or its file and its place there."""

    def class_place(self, label: int | None) -> str:
        """Where the images of a class are, for the text of errors; of None, all images."""
        return self.name if label is None else f"the class {self.classes[label]!r} of {self.name}"

    def channels(self, reading: Reading) -> int:
        """C, of the images that are read."""
        return reading.channels

    def check(self, reading: Reading) -> None:  # noqa: B027 - most read any size and colours
        """DataError if the images cannot be read so."""


class PackedNames:
    """Many names in little memory: bytes one after another, without an object for each.

    Ten million names of 30 bytes take 380 MB, as a list of strings more than a gigabyte; and a
    process that is forked shares them without a copy.
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        lengths: list[int] = []
        self._bytes = b"".join(_counted(names, lengths))
        self._ends = np.cumsum(np.array(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        return self._bytes[self._ends[index - 1] if index else 0 : self._ends[index]]

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))

    def digest(self) -> str:
        """A hash of the names and their order."""
        ends = hashlib.blake2b(self._ends.tobytes()).digest()
        return hashlib.blake2b(self._bytes, key=ends, digest_size=16).hexdigest()


def class_labels(counts: Iterable[int]) -> Tensor:
    """Labels of images in the order of their classes, int64 [N], of each class's number of them."""
    each = torch.tensor(list(counts), dtype=torch.int64, device="cpu")
    return torch.arange(len(each), device="cpu").repeat_interleave(each)


def _counted(names: Iterable[bytes], lengths: list[int]) -> Iterator[bytes]:
    for name in names:
        lengths.append(len(name))
        yield name
