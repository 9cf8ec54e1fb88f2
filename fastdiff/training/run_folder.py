"""What a run leaves in its folder besides checkpoints: logs, sample grids and a report."""

from __future__ import annotations

from pathlib import Path

from fastdiff.training.observers import Observer
from fastdiff.training.run_logs import LossLog, SessionLog, SpeedLog
from fastdiff.training.run_report.report_writer import ReportWriter
from fastdiff.training.sample_grids import GridWriter


def observers_of_folder(out: Path | None) -> list[Observer]:
    """The observers that write into a run's folder; the report is the last, as it reads the others.

    Args:
        out: the folder; None for no observers.
    """
    if out is None:
        return []
    return [LossLog(out), SpeedLog(out), SessionLog(out), GridWriter(out), ReportWriter(out)]
