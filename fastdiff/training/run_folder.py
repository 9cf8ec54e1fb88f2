"""What a run leaves in its folder besides checkpoints: logs and sample grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.data import image_grid
from fastdiff.training.observers import Observer
from fastdiff.training.run_logs import LossLog, SessionLog, SpeedLog

GRIDS = "samples"  # the folder of the sample grids


class GridFiles(Observer):
    """Writes sample grids to ``samples/step-XXXXXXXX.png``."""

    product = "sample grid"

    def __init__(self, out: Path) -> None:
        self._folder = out / GRIDS

    def grid(self, step: int, picture: Any) -> None:
        """Write a grid."""
        image_grid.save(picture, self._folder / f"step-{step:08d}.png")


def observers_of_folder(out: Path | None) -> list[Observer]:
    """The observers that write into a run's folder, in the order in which they must be told.

    Args:
        out: the folder; None for no observers.
    """
    if out is None:
        return []
    return [LossLog(out), SpeedLog(out), SessionLog(out), GridFiles(out)]
