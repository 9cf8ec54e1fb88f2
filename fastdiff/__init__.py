"""fastdiff: diffusion models in PyTorch, complete and fast.

The public names are those imported here and the modules ``ops``, ``nn``, ``schedules``,
``process``, ``losses``, ``objectives``, ``samplers``, ``sampling``, ``guidance``, ``sde``,
``compiler``, ``data``, ``training``, ``evaluation``, ``checkpoints``.
"""

from __future__ import annotations

from typing import Any

from fastdiff import (
    _moved,
    guidance,
    losses,
    nn,
    objectives,
    ops,
    process,
    samplers,
    schedules,
    sde,
)
from fastdiff.common.version import __version__
from fastdiff.diffusion import Diffusion
from fastdiff.ops.backend import backend
from fastdiff.ops.profiling import profile
from fastdiff.sampling import PerImage, Shared, sample
from fastdiff.schedules import NoiseSchedule
from fastdiff.sde import score_fn

__all__ = [
    "Diffusion", "NoiseSchedule", "PerImage", "Shared", "__version__", "backend", "guidance",
    "losses", "nn", "objectives", "ops", "process", "profile", "sample", "samplers", "schedules",
    "score_fn", "sde",
]  # fmt: skip

_moved.install()


def __getattr__(name: str) -> Any:
    if name == "compiler":  # brings Dynamo, which takes longer to import than all the rest
        import importlib

        return importlib.import_module("fastdiff.compiler")
    raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
