"""A folder of image files, in sub-folders by class or in none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from fastdiff.common.errors import DataError
from fastdiff.common.progress import progress_bar
from fastdiff.data import image_file
from fastdiff.data.file_names import as_path, as_text
from fastdiff.data.image_file import Depth, Reading
from fastdiff.data.image_source import ImageSource, PackedNames, class_labels

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
DELAY = 2.0  # seconds after which the search shows how far it is


class ImageFolder(ImageSource):
    """The image files of a folder, in the order of their classes and names.

    Args:
        root: the folder; see :func:`fastdiff.data.folder`.
        progress: show on standard error how many files were found.

    Raises:
        DataError: see :func:`find`.
    """

    def __init__(self, root: Path, *, progress: bool = True) -> None:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder of images" if root.exists() else f"no {root}")
        self.root = root.absolute()
        self.name = as_text(root.resolve().name)
        shown = progress_bar(desc="finding images", unit=" files", delay=DELAY, shown=progress)
        with shown as bar:
            groups = find(root, SUFFIXES, bar)
        self._names = PackedNames(map(os.fsencode, chain.from_iterable(groups.values())))
        self.listing = self._names.digest()
        if "" not in groups:
            self.classes = tuple(map(as_text, groups))
            self.labels = class_labels(map(len, groups.values()))

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> Path:
        """The file of image ``index``."""
        return self.root / os.fsdecode(self._names[index])

    def read(self, index: int, reading: Reading) -> tuple[np.ndarray, Depth | None]:
        """One image; see the base class."""
        path = self.path(index)
        return image_file.read(path, reading, str(path))

    def place(self, index: int) -> str:
        """The path of the file."""
        return str(self.path(index))

    def class_place(self, label: int | None) -> str:
        """The folder of a class."""
        return str(self.root if label is None else self.root / as_path(self.classes[label]))


def find(root: Path, suffixes: frozenset[str], bar: tqdm | None = None) -> dict[str, list[str]]:
    """The files of each class, relative to ``root``; without classes, all under the key "".

    Names that begin with a dot are skipped.

    Args:
        root: the folder; see :func:`fastdiff.data.folder`.
        suffixes: of the files to find, in small letters.
        bar: counts the files that are found.

    Raises:
        DataError: there are no such files, there are files both beside and in sub-folders, a
            sub-folder has none, or a folder cannot be listed.
    """
    count = (lambda: None) if bar is None else bar.update
    try:
        entries = _visible(str(root))
        direct = [entry.name for entry in entries if _is_wanted(entry, suffixes)]
        if bar is not None:
            bar.update(len(direct))
        below = {
            entry.name: list(
                _files(entry.path, entry.name, (os.path.realpath(root),), suffixes, count)
            )
            for entry in entries
            if _is_folder(entry)
        }
    except OSError as error:
        where = error.filename or root
        raise DataError(f"cannot list the folder {where}: {error.strerror or error}") from None
    if direct and any(below.values()):
        raise DataError(
            f"{root} has images both in itself and in sub-folders; "
            "put either every image into a sub-folder named after its class, or no image"
        )
    if not direct and not any(below.values()):
        raise DataError(f"{root} has no images (looked for {', '.join(sorted(suffixes))})")
    if direct:
        return {"": direct}
    for name, files in below.items():
        if not files:
            raise DataError(f"the class folder {root / name} has no images")
    return below


def _visible(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(shown, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or leads to one; a link in a circle does not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_wanted(entry: os.DirEntry[str], suffixes: frozenset[str]) -> bool:
    """Whether a file has a suffix; a link to nothing is an error when it is read."""
    return os.path.splitext(entry.name)[1].lower() in suffixes and not _is_folder(entry)


def _files(
    folder: str,
    name: str,
    above: tuple[str, ...],
    suffixes: frozenset[str],
    count: Callable[[], object],
) -> Iterator[str]:
    """Files in ``folder`` and below, in sorted order, their names beginning with ``name``.

    A link to one of the folders ``above`` is skipped, since following it would never end.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in _visible(folder):
        inner = f"{name}{os.sep}{entry.name}"
        if _is_folder(entry):
            yield from _files(entry.path, inner, (*above, real), suffixes, count)
        elif _is_wanted(entry, suffixes):
            count()
            yield inner
