"""Find out in which format images are: by what is there, not by what is said of it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from fastdiff.common.errors import DataError
from fastdiff.data import image_folder, latents, table_rows
from fastdiff.data.cifar import Cifar, is_cifar
from fastdiff.data.idx_files import IdxFiles, is_idx
from fastdiff.data.image_folder import ImageFolder
from fastdiff.data.image_source import ImageSource
from fastdiff.data.latents import Latents
from fastdiff.data.tar_shards import TarShards, expanded

HUB = "hf:"
LISTED = 10_000  # files of a folder that are looked at to tell its format
WANTED = (
    "image files, .tar shards, .parquet files, the binary version of CIFAR-10 or CIFAR-100, "
    "MNIST's idx files, or latents in .npy or .safetensors files"
)


def is_local(data: str) -> bool:
    """Whether a name of data is a path, or a pattern of paths, and no data set on the Hub."""
    return not data.startswith(HUB)


def find_source(
    data: str,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    progress: bool = True,
) -> ImageSource:
    """The images that a path or a name stands for.

    Args:
        data: a folder of image files, of tar shards, of parquet files, of CIFAR's binary version,
            of idx files such as MNIST's or of latents; a tar or parquet file; a pattern of shards
            such as ``shards/{000..099}.tar``; or ``hf:NAME`` or ``hf:NAME:SPLIT``, a data set of
            the Hugging Face Hub.
        split: of data that have splits: train, test, or as the data set names them.
        image_column: of a table, see :class:`fastdiff.data.table_rows.TableRows`.
        label_column: of a table, see there.
        progress: show a progress bar on standard error while files are listed.

    Raises:
        DataError: there is nothing, nothing known or more than one format; or what is there is
            damaged.
        InputError: a package is missing; the text says which.
    """
    columns = (image_column, label_column)
    if not is_local(data):
        name, _, part = data.removeprefix(HUB).partition(":")
        if not name:
            raise DataError(f"{data!r} names no data set, wanted hf:NAME or hf:NAME:SPLIT")
        return table_rows.from_hub(name, part or split, *columns)
    if "{" in data and not Path(data).exists():
        return TarShards(expanded(data), Path(data).parent.name, progress=progress)
    path = Path(data)
    if path.is_file():
        if path.suffix.lower() == ".tar":
            return TarShards([path], path.stem, progress=progress)
        if path.suffix.lower() == ".parquet":
            return table_rows.from_parquet([path], path.stem, split, *columns)
        raise DataError(f"{path} is not a folder of images, nor a .tar or .parquet file")
    if not path.is_dir():
        raise DataError(f"no {path}")
    return _in_folder(path, split, columns, progress)


def _in_folder(
    root: Path, split: str, columns: tuple[str | None, str | None], progress: bool
) -> ImageSource:
    try:
        inside = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot list the folder {root}: {error.strerror or error}") from None
    if is_cifar(set(inside)):
        return Cifar(root, split)
    if is_idx(set(inside)):
        return IdxFiles(root, split)
    kinds = _kinds(root)
    known = {
        "images": sum(kinds[suffix] for suffix in image_folder.SUFFIXES),
        "tar files": kinds[".tar"],
        "parquet files": kinds[".parquet"],
        "latents": sum(kinds[suffix] for suffix in latents.SUFFIXES),
    }
    present = [name for name, count in known.items() if count]
    if len(present) > 1:
        raise DataError(f"{root} has {' and '.join(present)}; wanted one of them")
    if not present or present == ["images"]:
        others = ", ".join(
            f"{count} {suffix or 'without suffix'}" for suffix, count in kinds.items()
        )
        if not present and others:
            raise DataError(f"{root} has no images (found {others}; wanted {WANTED})")
        return ImageFolder(root, progress=progress)
    if present == ["latents"]:
        return Latents(root, progress=progress)
    suffix = ".tar" if present == ["tar files"] else ".parquet"
    files = sorted(path for path in root.rglob(f"*{suffix}") if _is_shown(path, root))
    if suffix == ".tar":
        return TarShards(files, root.resolve().name, progress=progress)
    return table_rows.from_parquet(files, root.resolve().name, split, *columns)


def _kinds(root: Path) -> Counter[str]:
    """How many files of each suffix there are in a folder and below, among the first found."""
    kinds: Counter[str] = Counter()
    seen: set[str] = set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = sorted(name for name in below if not name.startswith(".") and real not in seen)
        seen.add(real)
        kinds.update(
            os.path.splitext(name)[1].lower() for name in files if not name.startswith(".")
        )
        if kinds.total() >= LISTED:
            break
    return kinds


def _is_shown(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)
