"""Files in the format idx, that of MNIST (LeCun et al. 1998) and the sets that take its place.

A file is a big-endian header (two zero bytes, the type of the values, the number of dimensions, and
each of the dimensions as 32 bits) and the values. Images are bytes in three dimensions [N, H, W] or
four [N, H, W, C], labels bytes in one. Files may be compressed by gzip.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdiff.common.errors import DataError
from fastdiff.data.file_names import as_text
from fastdiff.data.image_file import Depth, Reading, pixels
from fastdiff.data.image_source import ImageSource

BYTES = 8  # the format's number for unsigned bytes
# Names such as train-images-idx3-ubyte.gz, t10k-images.idx3-ubyte, emnist-letters-train-images-...
_IMAGES = re.compile(r"(?:^|[-_])(train|t10k|test)-images[-.]idx\d-ubyte(?:\.gz)?$")


def is_idx(names: set[str]) -> bool:
    """Whether a folder with files of these names holds images in this format."""
    return any(_IMAGES.search(name) for name in names)


class IdxFiles(ImageSource):
    """Grey images and labels in files of the format idx, such as MNIST; they are kept in memory.

    Args:
        root: folder with files such as train-images-idx3-ubyte and train-labels-idx1-ubyte.
        split: train or test; the files of the latter may be named test or t10k.

    Raises:
        DataError: a file is missing or damaged, or there are several sets in the folder.
    """

    def __init__(self, root: Path, split: str = "train") -> None:
        if split not in ("train", "test"):
            raise DataError(f"{root} has the splits train and test, not {split!r}")
        wanted = ("train",) if split == "train" else ("t10k", "test")
        found = [
            entry.name
            for entry in sorted(root.iterdir())
            if (match := _IMAGES.search(entry.name)) and match[1] in wanted
        ]
        if len(found) != 1:
            names = ", ".join(found) or "none"
            raise DataError(
                f"{root}: wanted one file of the images of {split}, such as "
                f"{wanted[0]}-images-idx3-ubyte.gz, found {names}"
            )
        self.path = (root / found[0]).absolute()
        self.name = as_text(root.resolve().name)
        self._images = _values(self.path, (3, 4))
        labels = self._labels(root)
        if labels is not None:
            self.labels = labels
            self.classes = tuple(map(str, range(int(labels.max()) + 1)))

    def __len__(self) -> int:
        return len(self._images)

    def channels(self, reading: Reading) -> int:
        """1 for the grey images of the files, which have no colours to read; else as asked for."""
        return 1 if self._images.ndim == 3 else reading.channels

    def read(self, index: int, reading: Reading) -> tuple[np.ndarray, Depth | None]:
        """One image; see the base class."""
        if self._images.ndim == 3:
            reading = replace(reading, grayscale=True)
        return pixels(Image.fromarray(self._images[index]), reading), None

    def place(self, index: int) -> str:
        """The file and the number of the image in it."""
        return f"{self.path}: image {index}"

    def _labels(self, root: Path) -> torch.Tensor | None:
        """The labels in the file that belongs to that of the images; None if there is none."""
        name = re.sub(r"-images([-.])idx\d", r"-labels\1idx1", self.path.name)
        either = (name, name.removesuffix(".gz"), f"{name}.gz")
        path = next((root / each for each in either if (root / each).exists()), None)
        if path is None:
            return None
        labels = _values(path, (1,))
        if len(labels) != len(self._images):
            raise DataError(
                f"{path}: {len(labels)} labels for the {len(self._images)} images of {self.path}"
            )
        return torch.from_numpy(labels.astype(np.int64))


def _values(path: Path, dimensions: tuple[int, ...]) -> np.ndarray:
    """The values of a file, uint8, of one of the numbers of dimensions."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    head = content[:4]
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != BYTES or head[3] not in dimensions:
        wanted = " or ".join(f"00 00 {BYTES:02x} {n:02x}" for n in dimensions)
        raise DataError(f"{path}: begins with the bytes {head.hex(' ')}, wanted {wanted}")
    start = 4 + 4 * head[3]
    shape = tuple(int(n) for n in np.frombuffer(content[4:start].ljust(start - 4, b"\0"), ">u4"))
    if not math.prod(shape) or len(content) != start + math.prod(shape):
        raise DataError(
            f"{path}: {len(content)} bytes, wanted {start + math.prod(shape)} for {shape} values"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
