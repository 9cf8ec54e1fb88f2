"""Errors that whoever runs the program can put right.

The command line shows them as one line; every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import torch


class InputError(ValueError):
    """An argument, a file or a setting that fastdiff cannot work with; the text says which."""


class DataError(InputError):
    """Training images that cannot be read or used."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, of another program, or cannot be written."""


class TrainingError(InputError):
    """Training that cannot go on, such as a loss that is no longer finite."""


class StuckError(InputError, RuntimeError):
    """A solver with steps of its own that its tolerance or its evaluations do not let go on."""


_OF_CPU = re.compile(r"tried to allocate (\d+) bytes")  # torch's allocator
# What torch and numpy say of an array whose bytes do not fit into 64 bits.
_BEYOND = ("Storage size calculation overflowed", "array is too big", "Maximum allowed dimension")


def memory_refused(error: BaseException) -> str | None:
    """What to say of an allocation that failed, in one line and with the bytes that were wanted.

    Args:
        error: a MemoryError of Python's or numpy's, or what torch raises in its place.

    Returns:
        None for an error of another kind.
    """
    text = str(error).split("\n")[0]
    if found := _OF_CPU.search(text):
        wanted = int(found[1])
        return f"not enough memory: {wanted} bytes ({wanted / 2**30:.1f} GiB) were wanted at once"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or text.startswith(_BEYOND):
        return f"not enough memory: {text or 'Python has none left'}"
    return None


def check_memory(*shape: int) -> None:
    """Ask torch for a tensor of a shape, before the work that will need one is begun.

    Raises:
        RuntimeError: there is no memory for it; :func:`memory_refused` says so in one line.
    """
    torch.empty(shape, device="cpu")


def require(module: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise InputError(
            f"this needs the package {module.split('.')[0]!r}: pip install 'fastdiff[train]'"
        ) from None
