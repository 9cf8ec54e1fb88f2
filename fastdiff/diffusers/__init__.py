"""Drop-in classes for diffusers: its own classes with fastdiff's kernels beneath.

Each class is a subclass of the one in ``diffusers`` that has its name, with the same arguments,
configuration and files. A pipeline takes them as it takes its own::

    from fastdiff.diffusers import DDIMScheduler
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

They are imported when they are first asked for, and want the package diffusers:
``pip install "fastdiff[diffusers]"``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.diffusers.few_step_schedulers import LCMScheduler, TCDScheduler
    from fastdiff.diffusers.markov_schedulers import (
        DDIMInverseScheduler,
        DDIMScheduler,
        DDPMScheduler,
    )
    from fastdiff.diffusers.multistep_schedulers import (
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        EDMDPMSolverMultistepScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    )
    from fastdiff.diffusers.score_sde_scheduler import ScoreSdeVeScheduler
    from fastdiff.diffusers.sigma_schedulers import (
        EDMEulerScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        HeunDiscreteScheduler,
        KDPM2DiscreteScheduler,
        LMSDiscreteScheduler,
    )
    from fastdiff.diffusers.unets import UNet2DConditionModel, UNet2DModel

_MODULES = {
    "few_step_schedulers": ("LCMScheduler", "TCDScheduler"),
    "markov_schedulers": ("DDIMInverseScheduler", "DDIMScheduler", "DDPMScheduler"),
    "multistep_schedulers": (
        "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
        "EDMDPMSolverMultistepScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
    ),
    "score_sde_scheduler": ("ScoreSdeVeScheduler",),
    "sigma_schedulers": (
        "EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
    ),
    "unets": ("UNet2DConditionModel", "UNet2DModel"),
}  # fmt: skip
_LATER = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DDIMInverseScheduler", "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "ScoreSdeVeScheduler", "TCDScheduler",
    "UNet2DConditionModel", "UNet2DModel", "UniPCMultistepScheduler",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'fastdiff.diffusers' has no attribute {name!r}")
    try:
        importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError(
            f'fastdiff.diffusers.{name} needs diffusers: pip install "fastdiff[diffusers]"'
        ) from error
    return getattr(importlib.import_module(f"fastdiff.diffusers.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
