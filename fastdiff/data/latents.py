"""Latents: what an image encoder made of images, in files .npy or .safetensors.

A file holds one latent [C, S, S] or several [N, C, S, S], in float16 or float32 (a safetensors file
also in bfloat16), all of one shape. A .npy file with pickled objects is refused.
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fastdiff.common.errors import DataError
from fastdiff.common.progress import progress_bar
from fastdiff.data.file_names import as_text
from fastdiff.data.image_file import Depth, Reading
from fastdiff.data.image_folder import find
from fastdiff.data.image_source import ImageSource, PackedNames

SUFFIXES = frozenset({".npy", ".safetensors"})


class Latents(ImageSource):
    """The latents of a folder; sub-folders are classes, as in a folder of images.

    Args:
        root: the folder.
        progress: show a progress bar on standard error while the headers of the files are read.

    Raises:
        DataError: a file is damaged, of another type, or its latents have another shape than those
            of the first file; and as :func:`fastdiff.data.image_folder.find`.
    """

    latents = True

    def __init__(self, root: Path, *, progress: bool = True) -> None:
        self.root, self.name = root.absolute(), as_text(root.resolve().name)
        groups = find(root, SUFFIXES)
        self._names = PackedNames(map(os.fsencode, chain.from_iterable(groups.values())))
        self.listing = self._names.digest()
        counts = []
        self.shape: tuple[int, ...] = ()
        each = progress_bar(range(len(self._names)), desc="reading headers", shown=progress)
        for file in each:
            shape = _shape(self._path(file))
            self.shape = self.shape or shape[-3:]
            if shape[-3:] != self.shape:
                raise DataError(
                    f"{self._path(file)} has latents of shape {shape[-3:]}, "
                    f"{self._path(0)} of {self.shape}"
                )
            counts.append(shape[0] if len(shape) == 4 else 1)
        self._ends = np.cumsum([0, *counts])
        if "" not in groups:
            self.classes = tuple(map(as_text, groups))
            files = [number for number, group in enumerate(groups.values()) for _ in group]
            self.labels = torch.tensor(files).repeat_interleave(torch.tensor(counts))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def channels(self, reading: Reading) -> int:
        """C, of the latents."""
        return self.shape[0]

    def check(self, reading: Reading) -> None:
        """DataError for options that are for pixels, or another size than that of the latents."""
        plain = Reading(self.shape[-1])
        for name in ("grayscale", "value_range", "crop", "resize"):
            if getattr(reading, name) != getattr(plain, name):
                raise DataError(f"{self.root} holds latents; {name} is for images")
        if reading.size != plain.size:
            raise DataError(
                f"{self.root} holds latents of shape {self.shape}, not of size {reading.size}: "
                f"size={plain.size} (--image-size {plain.size}) is wanted"
            )

    def read(self, index: int, reading: Reading) -> tuple[np.ndarray, Depth | None]:
        """One latent [S, S, C], float16 or float32; see the base class."""
        file = int(np.searchsorted(self._ends, index, side="right")) - 1
        path, place = self._path(file), self.place(index)
        values = _values(path, index - int(self._ends[file]))
        if values.shape != self.shape:
            raise DataError(f"{place}: now has shape {values.shape}, had {self.shape}")
        if not np.isfinite(values).all():
            raise DataError(f"{place}: holds values that are not finite")
        return values.transpose(1, 2, 0), None

    def place(self, index: int) -> str:
        """The file, and the number of the latent in it where there are several."""
        file = int(np.searchsorted(self._ends, index, side="right")) - 1
        start, end = (int(self._ends[file + i]) for i in (0, 1))
        return str(self._path(file)) + (f": latent {index - start}" if end - start > 1 else "")

    def class_place(self, label: int | None) -> str:
        """The folder of the latents."""
        return str(self.root)

    def _path(self, file: int) -> Path:
        return self.root / os.fsdecode(self._names[file])


def _shape(path: Path) -> tuple[int, ...]:
    """The shape of the array of a file, [C, S, S] or [N, C, S, S]."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            shape, dtype = array.shape, str(array.dtype)
        else:
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(_key(path, list(file.keys())))
                shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    if dtype not in ("float16", "float32", "F16", "F32", "BF16"):
        raise DataError(f"{path}: holds {dtype}, wanted float16 or float32")
    if len(shape) not in (3, 4) or shape[-1] != shape[-2] or 0 in shape:
        raise DataError(f"{path}: has shape {shape}, wanted [C, S, S] or [N, C, S, S]")
    return shape


def _values(path: Path, index: int) -> np.ndarray:
    """One latent of a file, [C, S, S]."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return np.array(array if array.ndim == 3 else array[index])
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(_key(path, list(file.keys())))
            tensor = part[:] if len(part.get_shape()) == 3 else part[index]
    except (OSError, ValueError, EOFError, IndexError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    half = tensor.dtype == torch.float16
    values: np.ndarray = (tensor if half else tensor.float()).numpy()
    return values


def _key(path: Path, keys: list[str]) -> str:
    if len(keys) != 1:
        raise DataError(f"{path}: holds the tensors {keys}, wanted one")
    return keys[0]


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return DataError(f"{path}: {text}")
