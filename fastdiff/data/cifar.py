"""The binary versions of CIFAR-10 and CIFAR-100 (Krizhevsky 2009): files of fixed-size records.

A record of CIFAR-10 is a byte with the class and 3072 bytes of pixels: 32x32 red ones, row by row,
then green, then blue. One of CIFAR-100 begins with two bytes, the coarse and the fine class. The
versions "for Python" are pickles, which can run any code when they are read; they are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdiff.common.errors import DataError
from fastdiff.data.file_names import as_text
from fastdiff.data.image_file import Depth, Reading, pixels
from fastdiff.data.image_source import ImageSource

SIDE = 32
VALUES = 3 * SIDE * SIDE


@dataclass(frozen=True)
class _Kind:
    """One of the two data sets.

    Attributes:
        splits: files of each split.
        heads: bytes of classes before the pixels; the last of them is the class.
        names: the file with the names of the classes, one a line.
        classes: number of classes.
        pickled: a file of the version for Python.
    """

    title: str
    splits: dict[str, tuple[str, ...]]
    heads: int
    names: str
    classes: int
    pickled: str


_KINDS = (
    _Kind(
        "CIFAR-10",
        {
            "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            "test": ("test_batch.bin",),
        },
        1,
        "batches.meta.txt",
        10,
        "batches.meta",
    ),
    _Kind(
        "CIFAR-100",
        {"train": ("train.bin",), "test": ("test.bin",)},
        2,
        "fine_label_names.txt",
        100,
        "meta",
    ),
)


def is_cifar(names: set[str]) -> bool:
    """Whether a folder with files of these names is CIFAR-10 or CIFAR-100, in any version."""
    return _kind(names) is not None or _pickled(names) is not None


class Cifar(ImageSource):
    """CIFAR-10 or CIFAR-100 in its binary version; of CIFAR-100 the fine classes.

    Args:
        root: folder of the files.
        split: train or test.

    Raises:
        DataError: the files are those of the version for Python, or a file is missing or damaged.
    """

    def __init__(self, root: Path, split: str = "train") -> None:
        present = {entry.name for entry in root.iterdir()}
        kind = _kind(present)
        if kind is None:
            title = _pickled(present)
            raise DataError(
                f"{root} holds the version of {title} for Python: pickles, which can run any code "
                "when they are read, so they are not. Take the binary version from the same page "
                f"({str(title).lower()}-binary.tar.gz) and give its folder of .bin files"
            )
        if split not in kind.splits:
            raise DataError(f"{kind.title} has the splits train and test, not {split!r}")
        self.root, self.name = root.absolute(), as_text(root.resolve().name)
        self.classes = _names(root / kind.names, kind.classes)
        self._record, self._heads = kind.heads + VALUES, kind.heads
        self._files = kind.splits[split]
        labels, self._ends = [], [0]
        for name in self._files:
            records = self._records(name)
            label = records[:, kind.heads - 1].astype(np.int64)
            if label.max() >= kind.classes:
                raise DataError(
                    f"{root / name}: record {int(label.argmax())} has the class {label.max()}, "
                    f"{kind.title} has classes 0 to {kind.classes - 1}"
                )
            labels.append(label)
            self._ends.append(self._ends[-1] + len(label))
        self.labels = torch.from_numpy(np.concatenate(labels))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int, reading: Reading) -> tuple[np.ndarray, Depth | None]:
        """One image; see the base class."""
        name, record = self._record_of(index)
        records = self._records(name)
        if record >= len(records):
            raise DataError(f"{self.place(index)}: the file now has {len(records)} records")
        values = records[record, self._heads :]
        image = np.ascontiguousarray(values.reshape(3, SIDE, SIDE).transpose(1, 2, 0))
        return pixels(Image.fromarray(image), reading), None

    def place(self, index: int) -> str:
        """The file and the number of the record in it."""
        name, record = self._record_of(index)
        return f"{self.root / name}: record {record}"

    def _record_of(self, index: int) -> tuple[str, int]:
        file = int(np.searchsorted(self._ends, index, side="right")) - 1
        return self._files[file], index - self._ends[file]

    def _records(self, name: str) -> np.ndarray:
        """The records of a file, uint8 [N, R], mapped to memory and not read."""
        path = self.root / name
        try:
            size = path.stat().st_size
            if not size or size % self._record:
                raise DataError(
                    f"{path}: {size} bytes are no whole number of records of {self._record}"
                )
            return np.memmap(path, np.uint8, "r").reshape(-1, self._record)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from None


def _kind(names: set[str]) -> _Kind | None:
    for kind in _KINDS:
        if kind.names in names and any(file in names for file in kind.splits["train"]):
            return kind
    return None


def _pickled(names: set[str]) -> str | None:
    """The title of the data set whose version for Python has files of these names."""
    for kind in _KINDS:
        files = {file.removesuffix(".bin") for file in kind.splits["train"]}
        if kind.pickled in names and files & names:
            return kind.title
    return None


def _names(path: Path, count: int) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    if len(lines) != count:
        raise DataError(f"{path}: {len(lines)} names of classes, wanted {count}")
    return tuple(lines)
