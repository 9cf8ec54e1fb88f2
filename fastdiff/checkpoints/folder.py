"""A folder of tensors and JSON: written whole or not at all; errors name the file."""

from __future__ import annotations

import errno
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

from fastdiff.common.errors import CheckpointError

FORMAT = 1  # of every JSON file

# What a file system says that cannot flush a file; and a folder, or open one for it.
UNFLUSHABLE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
UNFLUSHABLE_FOLDER = UNFLUSHABLE | {errno.EACCES, errno.EBADF, errno.EISDIR, errno.EPERM}

logger = logging.getLogger(__name__)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that becomes it when the block ends well, else disappears."""
    if target.exists():
        raise CheckpointError(f"{target} exists already; it was left as it is")
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a dead process that had this one's number
        staging.mkdir(parents=True)
        yield staging
        for file in staging.iterdir():
            _flush(file)
        _flush(staging)
        os.rename(staging, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"cannot write the checkpoint {target}: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk.

    Not every system can: Windows opens no folders, many network and shared file systems flush none,
    and some flush nothing. They have their own time for it; what they hold is none the less there.
    Errors of the disk itself, such as EIO and ENOSPC, are raised.
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
    """The tensors of a safetensors file; CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not complete: it has no {path.name}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that has NaN or infinity."""
    return next((name for name, value in tensors.items() if not value.isfinite().all()), None)


def damaged(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that is no safetensors file, or half of one."""
    size = path.stat().st_size
    return CheckpointError(f"{path} is damaged or no safetensors file ({size} bytes): {error}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; CheckpointError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_format(value: dict[str, Any], path: Path) -> None:
    """CheckpointError unless a JSON object is of this version."""
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {value.get('format')!r}; this fastdiff reads format {FORMAT}"
        )


def field(value: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    """An entry of a JSON object; CheckpointError unless it is there and of that kind."""
    found = value.get(key)
    if not isinstance(found, kind):
        raise CheckpointError(f"{path}: {key!r} must be a {kind.__name__}, got {found!r}")
    return found


def optional_field(value: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    """As :func:`field`, but None where there is no such entry, or null."""
    return None if value.get(key) is None else field(value, key, kind, path)
