"""What a run's folder tells of the run: curves, sample grids, processes, options."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdiff.checkpoints import checkpoint
from fastdiff.common import json_file
from fastdiff.common.errors import CheckpointError, InputError
from fastdiff.training.run_logs import LOSSES, SESSIONS, SPEED
from fastdiff.training.run_report.series import Series, ratio, read_log
from fastdiff.training.sample_grids import grid_files


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder tells of it.

    Attributes:
        folder: of the run.
        curves: by name: those of losses.jsonl, and ``images_per_second``, ``data_wait_share``,
            ``seconds`` and ``memory`` of speed.jsonl.
        grids: the files of the sample grids, by their steps, the earliest first.
        sessions: what sessions.jsonl has of each process, the first first.
        options: of the training, by name.
    """

    folder: Path
    curves: dict[str, Series]
    grids: dict[int, Path]
    sessions: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> RunRecord:
        """Read a run's folder; the run may be going on.

        Raises:
            InputError: the folder has no log of losses.
        """
        folder = Path(folder)
        if not (folder / LOSSES).is_file():
            raise InputError(f"{folder} is no folder of a run: it has no {LOSSES}")
        curves, speed = read_log(folder / LOSSES), read_log(folder / SPEED)
        if speed:
            curves["images_per_second"] = ratio(speed["images"], speed["seconds"])
            curves["data_wait_share"] = ratio(speed["waited"], speed["seconds"])
            curves |= {name: speed[name] for name in ("seconds", "memory", "device_memory")
                       if name in speed}  # fmt: skip
        sessions = _sessions(folder / SESSIONS)
        options = sessions[-1].get("options") if sessions else _recorded(folder)
        return cls(
            folder, curves, grid_files(folder), sessions,
            options if isinstance(options, dict) else {},
        )  # fmt: skip

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        """The last step that the log of losses has."""
        loss = self.curves.get("loss")
        return int(loss.steps[-1]) if loss is not None and len(loss) else 0

    @property
    def continued(self) -> list[int]:
        """The steps from which later processes continued the run."""
        return [int(session["step"]) for session in self.sessions[1:] if "step" in session]

    def fact(self, name: str) -> Any:
        """A value of the last process by its name, or None."""
        return self.sessions[-1].get(name) if self.sessions else None


def _sessions(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # a line that is being written, or was cut short
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _recorded(folder: Path) -> Any:
    """The options in the newest checkpoint, of a run without a log of its processes."""
    try:
        newest = checkpoint.newest(folder)
        return None if newest is None else json_file.read(newest / checkpoint.TRAINING)["options"]
    except (OSError, ValueError, KeyError, CheckpointError):
        return None
