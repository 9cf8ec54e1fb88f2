"""The checkpoint from which a run goes on: the newest one that is whole.

Disks and programs that copy files can damage what was written well. A run then goes on from an
earlier checkpoint rather than not at all, with a warning that names the damaged file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.folder import check_checksums, optional_field
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import CheckpointError, DamagedError
from fastdiff.common.world import World, is_first


@dataclass(frozen=True)
class Resumable:
    """A whole checkpoint of a run, with its training state.

    Attributes:
        folder: of the checkpoint.
        saved: the model and what is known of it.
        tensors: of the training state, see ``checkpoint.read_state``.
        facts: JSON values of the training state.
        damaged: newer checkpoints, which cannot be used.
    """

    folder: Path
    saved: Checkpoint
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    damaged: tuple[Path, ...] = ()


def find(out: str | Path) -> Resumable:
    """The newest checkpoint of a run that is not damaged.

    Args:
        out: the run's folder.

    Raises:
        CheckpointError: there is no checkpoint, or the newest one cannot be resumed though it is
            not damaged, as if another version has written it.
        DamagedError: all checkpoints are damaged; the text is that of the newest.
    """
    damaged: list[tuple[Path, DamagedError]] = []
    for folder in reversed(checkpoint.all_steps(out)):
        try:
            found = _read(folder, tuple(path for path, _ in damaged))
        except DamagedError as error:
            damaged.append((folder, error))
            continue
        for _, why in damaged if is_first() else []:
            warnings.warn(f"fastdiff: {why}; going on from {folder.name}", stacklevel=3)
        return found
    if damaged:
        raise damaged[0][1]
    raise CheckpointError(f"no checkpoint to resume in {out}")


def check_agreed(found: Resumable, world: World) -> None:
    """CheckpointError unless all processes of a run, which call this, found the same step."""
    fewest, most = -world.largest(-found.saved.step), world.largest(found.saved.step)
    if fewest != most:
        raise CheckpointError(
            "the processes of the run found different newest checkpoints in "
            f"{found.folder.parents[1]}, of steps {fewest} to {most}: it must be one folder for "
            "all of them"
        )


def set_aside(damaged: Sequence[Path]) -> None:
    """Give damaged checkpoints other names, so that the run can write those of their steps again.

    They are not deleted, since someone may want to know what has happened to them. One that cannot
    be renamed is left, with a warning.
    """
    for folder in damaged:
        names = (f"{folder.name}.damaged{number or ''}" for number in range(1000))
        target = next(path for name in names if not (path := folder.with_name(name)).exists())
        try:
            os.rename(folder, target)
        except OSError as error:
            warnings.warn(
                f"fastdiff: cannot rename the damaged checkpoint {folder}: "
                f"{error.strerror or error}",
                stacklevel=3,
            )


def _read(folder: Path, damaged: tuple[Path, ...]) -> Resumable:
    facts = checkpoint.read_facts(folder)
    path = folder / checkpoint.TRAINING
    check_checksums(folder, optional_field(facts, checkpoint.CHECKSUMS, dict, path) or {})
    saved = checkpoint.load(folder)
    tensors, facts = checkpoint.read_state(folder)
    return Resumable(folder, saved, tensors, facts, damaged)
