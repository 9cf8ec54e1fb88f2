"""fastdiff: diffusion models in PyTorch, complete and fast.

The public names are those imported here and the modules ``ops``, ``nn``, ``schedules``,
``process``, ``losses``, ``objectives``, ``samplers``, ``sampling``, ``guidance``, ``sde``,
``acceleration``, ``diffusers``, ``k_diffusion``, ``compiler``, ``data``, ``training``,
``evaluation``, ``checkpoints``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastdiff import _moved, nn, ops, process, samplers, schedules
from fastdiff.common.version import __version__
from fastdiff.ops.backend import backend
from fastdiff.ops.profiling import profile
from fastdiff.sampling import PerImage, Shared, sample
from fastdiff.schedules import NoiseSchedule

if TYPE_CHECKING:
    from fastdiff import diffusers, guidance, k_diffusion, losses, objectives, sde
    from fastdiff.acceleration import accelerate, restore
    from fastdiff.checkpoints.loading import load
    from fastdiff.diffusion import Diffusion
    from fastdiff.sde import score_fn

__all__ = [
    "Diffusion", "NoiseSchedule", "PerImage", "Shared", "__version__", "accelerate", "backend",
    "diffusers", "guidance", "k_diffusion", "load", "losses", "nn", "objectives", "ops", "process",
    "profile", "restore", "sample", "samplers", "schedules", "score_fn", "sde",
]  # fmt: skip

# What is imported when it is first asked for, and from where: together these modules take as long
# to import as all others, and the compiler alone brings Dynamo.
_LATER = {
    "Diffusion": "fastdiff.diffusion",
    "accelerate": "fastdiff.acceleration",
    "acceleration": "fastdiff.acceleration",
    "compiler": "fastdiff.compiler",
    "diffusers": "fastdiff.diffusers",
    "diffusion": "fastdiff.diffusion",
    "generation": "fastdiff.generation",
    "guidance": "fastdiff.guidance",
    "k_diffusion": "fastdiff.k_diffusion",
    "load": "fastdiff.checkpoints.loading",
    "losses": "fastdiff.losses",
    "objectives": "fastdiff.objectives",
    "restore": "fastdiff.acceleration",
    "score_fn": "fastdiff.sde",
    "sde": "fastdiff.sde",
}

_moved.install()


def __getattr__(name: str) -> Any:
    if name in _moved.MOVED:
        return importlib.import_module(f"fastdiff.{name}")
    if name not in _LATER:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    return module if module.__name__ == f"fastdiff.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
