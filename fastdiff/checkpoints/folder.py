"""Folders of tensors and JSON: written completely or not at all; errors name the file."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastdiff.common import json_file
from fastdiff.common.errors import CheckpointError, DamagedError, UnwritableError

FORMAT = 1  # version of the format, recorded in every JSON file

# Errors of file systems that have no way to flush a file; or to flush, or open, a folder.
UNFLUSHABLE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
UNFLUSHABLE_FOLDER = UNFLUSHABLE | {errno.EACCES, errno.EBADF, errno.EISDIR, errno.EPERM}

logger = logging.getLogger(__name__)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """For a ``with`` block, a folder to fill, which is renamed to ``target`` at its end.

    If the block raises, the folder is deleted. The files are on the disk before the new name is, so
    that a machine that loses power has the whole folder or none.

    Raises:
        CheckpointError: ``target`` exists.
        UnwritableError: the file system refused the write.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; it was left as it is")
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left by a dead process that had this PID
        staging.mkdir(parents=True)
        yield staging
        for file in staging.iterdir():
            flush(file)
        flush(staging)
        os.rename(staging, target)
        for folder in (target, *missing):
            flush(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UnwritableError(f"cannot write the checkpoint {target}: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk.

    Some systems cannot: Windows opens no folders, many network and shared file systems flush no
    folders, and some flush nothing. There the write is complete, but the system decides when it
    reaches the disk. Errors of the disk itself, such as EIO and ENOSPC, are raised.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (UNFLUSHABLE_FOLDER if path.is_dir() else UNFLUSHABLE):
            raise
        logger.info("%s is written, but cannot be flushed: %s", path, error)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; DamagedError if it is missing or damaged."""
    if not path.is_file():
        raise DamagedError(f"{path.parent} is not complete: it has no {path.name}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that has NaN or infinity, or None."""
    return next((name for name, value in tensors.items() if not value.isfinite().all()), None)


def damaged(path: Path, error: Exception) -> DamagedError:
    """The error for a file that is not a complete safetensors file."""
    size = path.stat().st_size
    return DamagedError(f"{path} is damaged or no safetensors file ({size} bytes): {error}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; DamagedError if the file cannot be read or holds no object."""
    try:
        return json_file.read(path)
    except OSError as error:
        raise DamagedError(f"cannot read {path}: {error}") from None
    except ValueError as error:
        raise DamagedError(str(error)) from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object to a file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each safetensors file of a folder, in hexadecimal, by the file's name."""
    return {path.name: _checksum(path) for path in sorted(folder.glob("*.safetensors"))}


def check_checksums(folder: Path, recorded: Mapping[str, Any]) -> None:
    """DamagedError unless the files of a folder have the recorded :func:`checksums`."""
    for name, wanted in recorded.items():
        path = folder / name
        try:
            found = _checksum(path)
        except OSError as error:
            raise DamagedError(f"cannot read {path}: {error.strerror or error}") from None
        if found != wanted:
            raise DamagedError(
                f"{path} is damaged: its SHA-256 is {found}, it was written with {wanted}"
            )


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def check_format(value: dict[str, Any], path: Path) -> None:
    """CheckpointError unless the JSON object ``value`` of the file ``path`` has this format."""
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {value.get('format')!r}; this fastdiff reads format {FORMAT}"
        )


def field(value: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    """An entry of the JSON object of ``path``; CheckpointError unless its type is ``kind``."""
    entry = value.get(key)
    if not isinstance(entry, kind):
        raise CheckpointError(f"{path}: {key!r} must be a {kind.__name__}, got {entry!r}")
    return entry


def optional_field(value: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    """As :func:`field`, but None if the entry is missing or null."""
    return None if value.get(key) is None else field(value, key, kind, path)
