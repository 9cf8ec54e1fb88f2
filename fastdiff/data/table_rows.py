"""Images in the rows of a table: a data set of the Hugging Face Hub, or parquet files.

The package ``datasets`` turns parquet files into Arrow files once, in its cache, which are mapped
to memory: a row is then read at any place without those before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.common.errors import DataError, require
from fastdiff.data import image_file
from fastdiff.data.file_names import as_text
from fastdiff.data.image_file import Depth, Reading
from fastdiff.data.image_source import ImageSource

LABEL_NAMES = ("label", "labels", "class", "fine_label", "cls")
MOST_CLASSES = 100_000  # of a column of labels without names of classes


class TableRows(ImageSource):
    """Images of a table of the package ``datasets``.

    Args:
        table: a ``datasets.Dataset``.
        name: of the data set.
        image_column: the column of the images; None takes the one that there is.
        label_column: the column of the labels; None takes the one column of classes, or one named
            label, labels, class, fine_label or cls, if there is one.

    Raises:
        DataError: there is no such column, or more than one.
    """

    def __init__(
        self,
        table: Any,
        name: str,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self.name = name
        if not len(table):
            raise DataError(f"{name} has no rows")
        self._column = _image_column(table, name, image_column)
        label = _label_column(table, name, label_column)
        if label is not None:
            self.labels, self.classes = _labels(table, name, label)
        # Whatever the column's type, rows are wanted as stored: a file's bytes, not decoded.
        self._rows = table.select_columns([self._column]).with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int, reading: Reading) -> tuple[np.ndarray, Depth | None]:
        """One image; see the base class."""
        place = self.place(index)
        try:
            value = self._rows[index][self._column][0].as_py()
        except Exception as error:  # Arrow has no common exception for damaged files
            raise DataError(f"{place}: {image_file.reason(error)}") from error
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            return image_file.read(Path(value["path"]), reading, place)
        if not isinstance(content, bytes):
            raise DataError(f"{place}: holds {type(content).__name__}, wanted an image's bytes")
        return image_file.read(content, reading, place)

    def place(self, index: int) -> str:
        """The data set, the row and the column."""
        return f"{self.name}: row {index}, column {self._column!r}"


def from_hub(
    name: str, split: str, image_column: str | None = None, label_column: str | None = None
) -> TableRows:
    """A split of a data set of the Hugging Face Hub, or of a folder that the package can read.

    Raises:
        DataError: it cannot be loaded; and see :class:`TableRows`.
        InputError: the package ``datasets`` is not installed.
    """
    datasets = require("datasets", extra="hf")
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # of the network, the Hub, the files: there is no common exception
        raise DataError(
            f"cannot load the split {split!r} of hf:{name}: {image_file.reason(error)}"
        ) from error
    return TableRows(table, name.rpartition("/")[2], image_column, label_column)


def from_parquet(
    files: list[Path],
    name: str,
    split: str,
    image_column: str | None = None,
    label_column: str | None = None,
) -> TableRows:
    """The rows of parquet files, those of a split if their names begin with it, as on the Hub.

    Raises:
        DataError: there are no files of that split, or they cannot be read; and see
            :class:`TableRows`.
        InputError: the package ``datasets`` is not installed.
    """
    datasets = require("datasets", extra="hf")
    splits = {"train", "test", "validation"}
    named = {path: path.name.partition("-")[0].partition(".")[0] for path in files}
    if splits & set(named.values()):
        files = [path for path, start in named.items() if start == split]
        if not files:
            found = ", ".join(sorted(splits & set(named.values())))
            raise DataError(f"{name} has no split {split!r} (found {found})")
    try:
        table = datasets.Dataset.from_parquet([str(path) for path in files])
    except Exception as error:  # neither datasets nor Arrow has a common exception
        raise DataError(
            f"cannot read the parquet files of {name}, from {files[0]} on: "
            f"{image_file.reason(error)}"
        ) from error
    return TableRows(table, as_text(name), image_column, label_column)


def _image_column(table: Any, name: str, wanted: str | None) -> str:
    """The column of images: of the type Image, or of an image's bytes."""
    if wanted is not None:
        return _known(table, name, wanted)
    found = [
        column
        for column, feature in table.features.items()
        if type(feature).__name__ == "Image" or _holds_bytes(feature)
    ]
    if len(found) != 1:
        raise DataError(
            f"{name} has {len(found)} columns of images {found} among {table.column_names}; "
            "name one by image_column (--image-column)"
        )
    return found[0]


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _label_column(table: Any, name: str, wanted: str | None) -> str | None:
    if wanted is not None:
        return _known(table, name, wanted)
    found = [
        column
        for column, feature in table.features.items()
        if type(feature).__name__ == "ClassLabel"
    ] or [column for column in LABEL_NAMES if column in table.column_names]
    if len(found) > 1:
        raise DataError(
            f"{name} has {len(found)} columns of labels {found}; name one by label_column "
            "(--label-column), or train without labels"
        )
    return found[0] if found else None


def _known(table: Any, name: str, column: str) -> str:
    if column not in table.column_names:
        raise DataError(f"{name} has no column {column!r} (found {table.column_names})")
    return column


def _labels(table: Any, name: str, column: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels int64 [N] and the names of the classes: those recorded, else the distinct values."""
    values = table.select_columns([column]).with_format("arrow")[:].column(column)
    if values.null_count:
        raise DataError(f"{name}: {values.null_count} rows have no value in column {column!r}")
    classes = getattr(table.features[column], "names", None)
    if classes is not None:
        labels = torch.from_numpy(np.asarray(values).astype(np.int64))
        outside = (labels < 0) | (labels >= len(classes))
        if bool(outside.any()):
            row = int(outside.int().argmax())
            raise DataError(
                f"{name}: row {row} has the label {int(labels[row])}, the column {column!r} has "
                f"classes 0 to {len(classes) - 1}"
            )
        return labels, tuple(classes)
    distinct, numbers = np.unique(np.asarray(values.to_pylist()), return_inverse=True)
    if distinct.dtype.kind not in "iuUb" or len(distinct) > MOST_CLASSES:
        raise DataError(
            f"{name}: column {column!r} holds {len(distinct)} distinct values of type "
            f"{distinct.dtype}, wanted whole numbers or text, at most {MOST_CLASSES} of them"
        )
    return torch.from_numpy(numbers.astype(np.int64)), tuple(map(str, distinct.tolist()))
