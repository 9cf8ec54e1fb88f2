"""Loggers: a run's scalars and sample grids in TensorBoard, Weights & Biases or Trackio.

Each of them is another package, which is imported only when its logger is made. A logger that fails
never ends a run. A run that is resumed goes on in the same log: TensorBoard hides the steps that
are done again, and the others know the run by the name that is kept in its folder.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.common.errors import require
from fastdiff.training.observers import Observer, RunStart, StepRecord

PROJECT = "fastdiff"  # of a run, if the logger's own environment variable names none
IDENTITY = "identity.json"  # has the name by which loggers know the run
# The names of values in a log; the part before the stroke is a heading.
_TITLES = {
    "loss": "train/loss",
    "lr": "train/learning_rate",
    "gradient_norm": "train/gradient_norm",
    "validation_loss": "validation/loss",
    "validation_loss_raw": "validation/loss_raw",
}


def scalars(record: StepRecord) -> dict[str, float]:
    """The finite numbers of a step, by the names that logs give them.

    Args:
        record: of the step. Value k of a list has the name of the list and ``_k``.
    """
    named: dict[str, Any] = {}
    for name, value in record.values.items():
        title = _TITLES.get(name) or (
            f"validation/{name.removeprefix('validation_')}" if name.startswith("validation_")
            else f"train/{name}"
        )  # fmt: skip
        members = enumerate(value) if isinstance(value, list) else [(None, value)]
        named |= {title if k is None else f"{title}_{k}": member for k, member in members}
    named |= {f"speed/{name}": value for name, value in record.speed.items()}
    return {
        title: float(value)
        for title, value in named.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


class TensorBoard(Observer):
    """Writes event files for TensorBoard into ``tensorboard`` in the run's folder.

    Args:
        folder: for the event files; None for that one.

    Raises:
        InputError: the package tensorboard is not installed.
    """

    product = "TensorBoard log"
    foreign = True

    def __init__(self, folder: str | Path | None = None) -> None:
        self._module = require("tensorboard", "tensorboard") and require(
            "torch.utils.tensorboard", "tensorboard"
        )
        self._folder = folder

    def begin(self, start: RunStart) -> None:
        """Open the event file; events of steps that are done again will be hidden."""
        folder = self._folder or Path(start.out or ".") / "tensorboard"
        self._writer = self._module.SummaryWriter(
            log_dir=str(folder), purge_step=start.finished_steps + 1
        )
        facts = json.dumps(start.facts, indent=2)
        self._writer.add_text("run", f"```json\n{facts}\n```", start.finished_steps)

    def step(self, record: StepRecord) -> None:
        """Write the scalars of a step."""
        for title, value in scalars(record).items():
            self._writer.add_scalar(title, value, record.step)

    def grid(self, step: int, picture: Any) -> None:
        """Write a grid."""
        self._writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")

    def checkpoint(self, step: int) -> None:
        """See that what led to a checkpoint is in the file."""
        self._writer.flush()

    def end(self) -> None:
        """Close the event file."""
        self._writer.close()


class Wandb(Observer):
    """Logs to Weights & Biases, as its environment variables say.

    WANDB_MODE=offline needs no network, WANDB_PROJECT names the project. A step that is done again
    is in the log already; wandb keeps the first, which has the same losses.

    Raises:
        InputError: the package wandb is not installed.
    """

    product = "log of Weights & Biases"
    foreign = True

    def __init__(self) -> None:
        self._module = require("wandb", "wandb")
        self._run: Any = None

    def begin(self, start: RunStart) -> None:
        """Begin the run, or go on with it."""
        name, identity = identify(start.out)
        self._run = self._module.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=None if start.out is None else str(start.out),
            id=identity,
            name=name,
            config=dict(start.facts),
            resume="allow",
        )

    def step(self, record: StepRecord) -> None:
        """Log the scalars of a step."""
        self._run.log(scalars(record), step=record.step)

    def grid(self, step: int, picture: Any) -> None:
        """Log a grid."""
        self._run.log({"samples": self._module.Image(picture)}, step=step)

    def end(self) -> None:
        """End the run, if it has begun."""
        if self._run is not None:
            self._run.finish()


class Trackio(Observer):
    """Logs to Trackio, in the folder or to the server that its environment variables name.

    Raises:
        InputError: the package trackio is not installed.
    """

    product = "log of Trackio"
    foreign = True

    def __init__(self) -> None:
        self._module = require("trackio", "trackio")
        self._begun = False

    def begin(self, start: RunStart) -> None:
        """Begin the run, or go on with it."""
        name, identity = identify(start.out)
        self._module.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{name}-{identity}",
            config=dict(start.facts),
            resume="allow",
        )
        self._begun = True

    def step(self, record: StepRecord) -> None:
        """Log the scalars of a step."""
        self._module.log(scalars(record), step=record.step)

    def grid(self, step: int, picture: Any) -> None:
        """Log a grid."""
        self._module.log({"samples": self._module.Image(picture)}, step=step)

    def end(self) -> None:
        """End the run, if it has begun."""
        if self._begun:
            self._module.finish()


LOGGERS: Mapping[str, type[TensorBoard | Wandb | Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def identify(out: Path | None) -> tuple[str, str]:
    """The name of a run's folder, and the identity by which loggers know the run.

    The identity is made up once, and kept in the folder; without a folder it is new each time.
    """
    if out is None:
        return "run", secrets.token_hex(4)
    path = out / IDENTITY
    if not path.exists():
        path.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n", encoding="utf-8")
    return out.resolve().name, str(json.loads(path.read_text(encoding="utf-8"))["id"])
