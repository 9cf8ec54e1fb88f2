"""Processes in continuous time: VP, sub-VP, VE, EDM, those of a log-SNR and of schedules."""

from __future__ import annotations

from fastdiff.sde.processes.edm import EDM
from fastdiff.sde.processes.from_schedule import Interpolated, Straight
from fastdiff.sde.processes.linear_sde import SDE
from fastdiff.sde.processes.log_snr import CosineLogSNR, LearnedLogSNR, LinearLogSNR, LogSNR
from fastdiff.sde.processes.ve import VE
from fastdiff.sde.processes.vp import VP, SubVP

__all__ = [
    "EDM", "SDE", "VE", "VP", "CosineLogSNR", "Interpolated", "LearnedLogSNR", "LinearLogSNR",
    "LogSNR", "Straight", "SubVP",
]  # fmt: skip
