"""Images in tar files, the shards of WebDataset, read at any place without unpacking.

The members of a sample share their name up to the first dot of its last part: 00017.jpg is the
image and 00017.cls, a number as text, its class. A tar file has no table of contents, so the shards
are scanned once for the places of their members; what was found is kept in the user's cache folder
and used as long as the shards have the same sizes and times.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fastdiff.common.errors import DataError
from fastdiff.common.progress import progress_bar
from fastdiff.data import image_file
from fastdiff.data.file_names import as_text
from fastdiff.data.image_file import Depth, Reading
from fastdiff.data.image_folder import SUFFIXES
from fastdiff.data.image_source import ImageSource, PackedNames

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
CLASS_BYTES = 20  # the longest text of a class


class TarShards(ImageSource):
    """Images in tar files, in the order of the shards and in that of the members.

    Labels come from the members .cls, if every image has one; their classes are named "0" to the
    largest. Without them, images that lie in at least two folders within the shards have the first
    part of their folder as class.

    Args:
        shards: the tar files, not compressed.
        name: of the data set.
        progress: show a progress bar on standard error while the shards are scanned.

    Raises:
        DataError: a shard is missing, compressed or damaged, or there are no images.
    """

    def __init__(self, shards: Sequence[Path], name: str, *, progress: bool = True) -> None:
        self.shards = [path.absolute() for path in shards]
        self.name = as_text(name)
        found = _kept(self.shards) or _scan(self.shards, progress)
        self._shard, self._start, self._size, labels = found.columns
        self._names = PackedNames(found.names)
        if not len(self._names):
            raise DataError(f"no images in the tar files of {name}, from {self.shards[0]} on")
        self.listing = self._names.digest()
        self._set_labels(labels)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int, reading: Reading) -> tuple[np.ndarray, Depth | None]:
        """One image; see the base class."""
        place = self.place(index)
        start, size = int(self._start[index]), int(self._size[index])
        try:
            with self.shards[self._shard[index]].open("rb") as file:
                content = os.pread(file.fileno(), size, start)
        except OSError as error:
            raise DataError(f"{place}: {error.strerror or error}") from None
        if len(content) != size:
            raise DataError(f"{place}: the tar file ends after {len(content)} of its {size} bytes")
        return image_file.read(content, reading, place)

    def place(self, index: int) -> str:
        """The tar file and the member."""
        member = os.fsdecode(self._names[index])
        return f"{self.shards[self._shard[index]]}: {member}"

    def _set_labels(self, labels: np.ndarray) -> None:
        if (labels >= 0).all():
            self.labels = torch.from_numpy(labels)
            self.classes = tuple(map(str, range(int(labels.max()) + 1)))
            return
        if (labels >= 0).any():
            place = self.place(int(labels.argmin()))
            raise DataError(f"{place} has no class in a member .cls, but others have")
        folders = [_folder(name) for name in self._names]
        classes = sorted(set(folders))
        if len(classes) > 1 and b"" not in classes:
            numbers = {folder: number for number, folder in enumerate(classes)}
            self.labels = torch.tensor([numbers[folder] for folder in folders])
            self.classes = tuple(as_text(os.fsdecode(folder)) for folder in classes)


def expanded(pattern: str) -> list[Path]:
    """The paths that a pattern such as ``shards/{000..099}.tar`` stands for, in order.

    Raises:
        DataError: a range that counts down.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [Path(pattern)]
    first, last = match[1], match[2]
    if int(first) > int(last):
        raise DataError(f"{pattern}: the range {match[0]} counts down")
    paths: list[Path] = []
    for number in range(int(first), int(last) + 1):
        digits = str(number).zfill(len(first))
        paths += expanded(pattern[: match.start()] + digits + pattern[match.end() :])
    return paths


@dataclass
class _Members:
    """The images of all shards, N of them.

    Attributes:
        columns: int64 [4, N]: the number of the shard, where the bytes begin in it, how many they
            are, and the label or -1.
        names: of the members.
    """

    columns: np.ndarray
    names: list[bytes]


@dataclass
class _Shard:
    """What is found in one shard, by the keys of its samples."""

    names: list[bytes] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def _scan(shards: Sequence[Path], progress: bool) -> _Members:
    """Find the images of all shards, and keep what was found for the next time."""
    parts = [np.empty((4, 0), dtype=np.int64)]
    names: list[bytes] = []
    total = 0
    for path in shards:
        try:
            total += path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from None
    shown = progress_bar(
        total=total, desc="scanning tar files", unit="B", unit_scale=True, shown=progress
    )
    with shown as bar:
        for number, path in enumerate(shards):
            shard = _scan_one(path)
            labels = [shard.labels.get(key, -1) for key in shard.keys]
            starts, sizes = zip(*shard.places, strict=True) if shard.places else ((), ())
            columns = ([number] * len(labels), starts, sizes, labels)
            parts.append(np.array(columns, dtype=np.int64))
            names += shard.names
            bar.update(path.stat().st_size)
    found = _Members(np.concatenate(parts, axis=1), names)
    with suppress(OSError):  # without a cache folder the shards are scanned every time
        _keep(found, shards)
    return found


def _scan_one(path: Path) -> _Shard:
    shard = _Shard()
    try:
        end = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not member.isreg() or not stem:
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"it ends within its member {member.name}")
                key = f"{folder}/{stem}"
                if f".{suffix.rpartition('.')[2].lower()}" in SUFFIXES:
                    shard.names.append(member.name.encode("utf-8", "surrogateescape"))
                    shard.places.append((member.offset_data, member.size))
                    shard.keys.append(key)
                elif suffix == "cls":
                    shard.labels[key] = _class_of(archive, member, path)
    except (tarfile.TarError, EOFError) as error:
        with path.open("rb") as file:
            compressed = file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7")
        reason = (
            "it is compressed, so that nothing in its middle can be read; unpack it to a plain .tar"
            if compressed
            else str(error)
        )
        raise DataError(f"cannot read the tar file {path}: {reason}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    return shard


def _class_of(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = archive.extractfile(member)
    text = b"" if file is None else file.read(CLASS_BYTES)
    if not text.strip().isdigit() or int(text) >= 2**31:
        raise DataError(f"{path}: {member.name} holds {text!r}, wanted the number of a class")
    return int(text)


def _folder(name: bytes) -> bytes:
    """The first part of the folder of a member, b"" without one."""
    folder = name.removeprefix(b"./").rpartition(b"/")[0]
    return folder.partition(b"/")[0]


def _index_file(shards: Sequence[Path]) -> Path:
    """Where what is found in shards of these names, sizes and times is kept."""
    facts = "\n".join(f"{path} {(s := path.stat()).st_size} {s.st_mtime_ns}" for path in shards)
    key = hashlib.blake2b(facts.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastdiff" / f"tar-{key}.npz"


def _kept(shards: Sequence[Path]) -> _Members | None:
    """What an earlier scan of the same shards found; None if there is no usable record."""
    try:
        with np.load(_index_file(shards), allow_pickle=False) as saved:
            columns, names = saved["columns"], saved["names"].tobytes()
            ends = saved["ends"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    if columns.dtype != np.int64 or columns.shape != (4, len(ends)) or not len(ends):
        return None
    if not ((columns[0] >= 0) & (columns[0] < len(shards)) & (columns[1] >= 0)).all():
        return None
    return _Members(columns, list(_pieces(names, ends)))


def _pieces(names: bytes, ends: np.ndarray) -> Iterator[bytes]:
    start = 0
    for end in ends.tolist():
        yield names[start:end]
        start = end


def _keep(found: _Members, shards: Sequence[Path]) -> None:
    path = _index_file(shards)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own on every machine that shares the folder; tempfile's files are for one user.
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        with partial.open("xb") as file:
            np.savez(
                file,
                columns=found.columns,
                names=np.frombuffer(b"".join(found.names), np.uint8),
                ends=np.cumsum([len(name) for name in found.names], dtype=np.int64),
            )
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
