"""Averages by a power function that a run keeps along the way, from which others are made later.

    OUT/snapshots/step-00001000/std-0.05.safetensors   the average's weights, by parameter
    OUT/snapshots/step-00001000/snapshot.json          the step and the averages

A snapshot is written whole or not at all. The module ``post_hoc`` combines them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoints.folder import (
    FORMAT,
    check_format,
    field,
    new_folder,
    read_json,
    read_tensors,
    write_json,
)
from fastdiff.common.errors import CheckpointError
from fastdiff.common.tensor_file import save_file
from fastdiff.common.world import World
from fastdiff.training.averages import Averages
from fastdiff.training.observers import Observer, RunStart, StepRecord
from fastdiff.training.training_options import TrainingOptions

FACTS = "snapshot.json"


@dataclass(frozen=True)
class Snapshot:
    """One average that a run kept.

    Attributes:
        step: number of steps done when it was kept.
        std: relative standard deviation of the average's profile.
        path: the file of its weights.
    """

    step: int
    std: float
    path: Path

    def read(self) -> dict[str, Tensor]:
        """Its weights; CheckpointError if the file is missing or damaged."""
        return read_tensors(self.path)


class SnapshotKeeper(Observer):
    """Keeps the averages of a run by a power function, evenly over the run.

    If the file system refuses a snapshot, one of the step of the next checkpoint takes its place:
    what is made of snapshots later needs many of them, but none of a certain step.

    Args:
        out: the run's folder.
        averages: of the run.
        options: for the number of snapshots and their dtype.
        world: the processes, of which the first writes; others help to gather averages in shards.
    """

    product = "snapshot of averages"

    def __init__(
        self, out: Path, averages: Averages, options: TrainingOptions, world: World
    ) -> None:
        self._out, self._averages, self._options, self._world = out, averages, options, world
        self._missing = False

    def begin(self, start: RunStart) -> None:
        """Delete snapshots of steps that are to be done again, perhaps with other weights."""
        if self._world.first:
            delete_after(self._out, start.finished_steps)

    def step(self, record: StepRecord) -> None:
        """Keep the averages if a snapshot is due."""
        if due(record.step, self._options.steps, self._options.snapshots):
            self._keep(record.step)

    def before_checkpoint(self, step: int) -> None:
        """Keep the averages if they could not be kept when it was due."""
        missing = self._missing
        if self._options.shard:  # all gather, or none
            missing = bool(self._world.largest(missing))
        if missing:
            self._keep(step)

    def _keep(self, step: int) -> None:
        self._missing = True
        dtype, states = getattr(torch, self._options.snapshot_dtype), self._averages.power_states()
        if self._world.first:
            write(self._out, step, states, dtype)
        self._missing = False


def due(step: int, steps: int, count: int) -> bool:
    """Whether one of ``count`` snapshots, even over ``steps`` steps, is after ``step`` steps."""
    return step * count // steps > (step - 1) * count // steps


def write(
    out: Path, step: int, states: Mapping[float, Mapping[str, Tensor]], dtype: torch.dtype
) -> None:
    """Keep averages, unless the step has them already.

    Args:
        out: the run's folder.
        step: number of steps done.
        states: the weights of each average, by its relative standard deviation.
        dtype: of the files.

    Raises:
        CheckpointError: the file system refused the write.
    """
    folder = out / "snapshots" / f"step-{step:08d}"
    if folder.exists():
        return
    with new_folder(folder) as staging:
        for std, state in states.items():
            tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}
            save_file(tensors, staging / _file(std))
        write_json(staging / FACTS, {"format": FORMAT, "step": step, "stds": list(states)})


def delete_after(out: Path, step: int) -> None:
    """Delete the snapshots of a run that are later than ``step``, and unfinished writes."""
    for folder in out.glob("snapshots/*"):
        if folder.name.endswith(".partial") or _step(folder) > step:
            shutil.rmtree(folder)


def find(out: Path) -> list[Snapshot]:
    """The snapshots of a run, oldest first.

    Raises:
        CheckpointError: a snapshot is damaged.
    """
    return [snapshot for folder in sorted(out.glob("snapshots/step-*")) for snapshot in _in(folder)]


def _in(folder: Path) -> Iterator[Snapshot]:
    facts = read_json(folder / FACTS)
    check_format(facts, folder / FACTS)
    step = field(facts, "step", int, folder / FACTS)
    for std in field(facts, "stds", list, folder / FACTS):
        if not isinstance(std, float) or step < 1:
            raise CheckpointError(f"{folder / FACTS} has the step {step} and the average {std!r}")
        yield Snapshot(step, std, folder / _file(std))


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def _file(std: float) -> str:
    return f"std-{std!r}.safetensors"
