"""Errors that the user of the program can correct.

The command line shows them in one line. Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import torch


class InputError(ValueError):
    """An argument, a file or a setting that fastdiff cannot use; the text names it."""


class DataError(InputError):
    """Training images that cannot be read or used."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, of another program, or impossible to write."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are incomplete or not as they were written."""


class UnwritableError(CheckpointError):
    """A checkpoint that the file system refused to take; what is on the disk is as it was."""


class LockedError(InputError):
    """The folder of a run into which another process writes."""


class TrainingError(InputError):
    """Training that cannot go on, such as a loss that is no longer finite."""


class StuckError(InputError, RuntimeError):
    """An adaptive solver that cannot continue within its tolerance or number of evaluations."""


_ALLOCATION = re.compile(r"tried to allocate (\d+) bytes")  # error of torch's CPU allocator
# Errors of torch and numpy for an array whose number of bytes exceeds 64 bits.
_OVERFLOWS = (
    "Storage size calculation overflowed", "array is too big", "Maximum allowed dimension",
)  # fmt: skip


def memory_refused(error: BaseException) -> str | None:
    """One line for an allocation that failed, with the number of bytes if it is known.

    Args:
        error: a MemoryError of Python or numpy, or an error of torch in its place.

    Returns:
        None if the error is of another kind.
    """
    text = str(error).split("\n")[0]
    if match := _ALLOCATION.search(text):
        wanted = int(match[1])
        return f"not enough memory: {wanted} bytes ({wanted / 2**30:.1f} GiB) were wanted at once"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or text.startswith(_OVERFLOWS):
        return f"not enough memory: {text or 'Python has none left'}"
    return None


def check_memory(*shape: int) -> None:
    """Allocate and free a float tensor of a shape, to fail before long work that needs one.

    Raises:
        RuntimeError: there is not enough memory; see :func:`memory_refused` for a text of one line.
    """
    torch.empty(shape, device="cpu")


def require(module: str, extra: str = "train") -> ModuleType:
    """Import a module of an optional dependency.

    Args:
        module: its name.
        extra: the extra of fastdiff that brings its package.

    Raises:
        InputError: the package is not installed; the text says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise InputError(
            f"this needs the package {module.split('.')[0]!r}: pip install 'fastdiff[{extra}]'"
        ) from None
