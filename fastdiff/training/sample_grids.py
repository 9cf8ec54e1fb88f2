"""The files of sample grids in a run's folder: ``samples/step-00000500.png``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.data import image_grid
from fastdiff.training.observers import Observer

FOLDER = "samples"


class GridWriter(Observer):
    """Writes sample grids."""

    product = "sample grid"

    def __init__(self, out: Path) -> None:
        self._folder = out / FOLDER

    def grid(self, step: int, picture: Any) -> None:
        """Write a grid."""
        image_grid.save(picture, self._folder / f"step-{step:08d}.png")


def grid_files(out: Path) -> dict[int, Path]:
    """The files of the sample grids in a run's folder by their steps, the earliest first."""
    files = {int(p.stem[5:]): p for p in (out / FOLDER).glob("step-*.png") if p.stem[5:].isdigit()}
    return dict(sorted(files.items()))
