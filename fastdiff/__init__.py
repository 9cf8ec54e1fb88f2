"""fastdiff: diffusion models in PyTorch, complete and fast.

The public names are those imported here and the modules ``ops``, ``nn``, ``schedules``,
``process``, ``samplers``, ``sampling``, ``data``, ``training``, ``evaluation``, ``checkpoint``.
"""

from __future__ import annotations

from fastdiff import nn, ops, process, samplers, schedules
from fastdiff.backend import backend
from fastdiff.profiling import profile
from fastdiff.sampling import sample
from fastdiff.schedules import NoiseSchedule

__version__ = "0.1.0"

__all__ = [
    "NoiseSchedule", "__version__", "backend", "nn", "ops", "process", "profile", "sample",
    "samplers", "schedules",
]  # fmt: skip
