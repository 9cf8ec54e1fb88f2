"""Errors that whoever runs the program can put right.

The command line shows them as one line; every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType


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
