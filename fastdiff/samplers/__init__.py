"""Samplers of the reverse process: each writes a coefficient table, one row per evaluation.

``fastdiff.sample`` runs all of them in one loop. A table cannot express methods that choose their
step sizes while they run: those are in ``fastdiff.sde.solvers``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fastdiff.samplers import grids
from fastdiff.samplers.consistency import LCM, Consistency
from fastdiff.samplers.ddim import DDIM, DDIMInverse
from fastdiff.samplers.ddpm import DDPM
from fastdiff.samplers.deis import DEIS
from fastdiff.samplers.dpm_solver import DPMSolver, DPMSolverPPSinglestep
from fastdiff.samplers.dpmpp_multistep import (
    DPMSolverPP2MSDE,
    DPMSolverPP3MSDE,
    DPMSolverPPMultistep,
)
from fastdiff.samplers.dpmpp_sde import DPMSolverPPSDE
from fastdiff.samplers.euler import Euler
from fastdiff.samplers.euler_ancestral import EulerAncestral
from fastdiff.samplers.heun import Heun
from fastdiff.samplers.kdpm import KDPM2
from fastdiff.samplers.lms import LMS
from fastdiff.samplers.plms import PLMS
from fastdiff.samplers.sampler import Sampler
from fastdiff.samplers.substeps import DPM2Ancestral, DPMSolverFast, DPMSolverPP2SAncestral
from fastdiff.samplers.table import COLUMNS, Table
from fastdiff.samplers.unipc import UniPC
from fastdiff.schedules import GaussianPath

__all__ = [
    "COLUMNS", "DDIM", "DDPM", "DEIS", "KDPM2", "LCM", "LMS", "PLMS", "Consistency", "DDIMInverse",
    "DPM2Ancestral", "DPMSolver", "DPMSolverFast", "DPMSolverPP2MSDE", "DPMSolverPP2SAncestral",
    "DPMSolverPP3MSDE", "DPMSolverPPMultistep", "DPMSolverPPSDE", "DPMSolverPPSinglestep", "Euler",
    "EulerAncestral", "Heun", "Sampler", "Table", "UniPC", "grids", "make", "names",
]  # fmt: skip

_REGISTRY: dict[str, Callable[..., Sampler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "ddim-inverse": DDIMInverse,
    "plms": PLMS,
    "euler": Euler,
    "euler-ancestral": EulerAncestral,
    "heun": Heun,
    "kdpm-2": KDPM2,
    **{f"dpm-{order}": partial(DPMSolver, order=order) for order in (1, 2, 3)},
    "dpm-2-ancestral": DPM2Ancestral,
    "dpm-fast": DPMSolverFast,
    **{f"dpmpp-{order}s": partial(DPMSolverPPSinglestep, order=order) for order in (1, 2)},
    "dpmpp-2s-ancestral": DPMSolverPP2SAncestral,
    **{f"dpmpp-{order}m": partial(DPMSolverPPMultistep, order=order) for order in (2, 3)},
    "dpmpp-sde": DPMSolverPPSDE,
    "dpmpp-2m-sde": DPMSolverPP2MSDE,
    "dpmpp-3m-sde": DPMSolverPP3MSDE,
    **{f"unipc-{order}": partial(UniPC, order=order) for order in (1, 2, 3)},
    **{f"deis-{order}": partial(DEIS, order=order) for order in (2, 3)},
    "lms": LMS,
    "lcm": LCM,
    "consistency": Consistency,
}


def names() -> tuple[str, ...]:
    """The samplers that :func:`make` knows by name."""
    return tuple(_REGISTRY)


def make(name: str, schedule: GaussianPath, steps: int, **options: Any) -> Sampler:
    """The sampler called ``name``, for ``steps`` steps of ``schedule``.

    Raises:
        TypeError: an option that the sampler does not have.
        ValueError: unknown name, or options that the sampler refuses.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown sampler {name!r}, wanted one of {', '.join(_REGISTRY)}")
    kind = _REGISTRY[name]
    if "order" in options and isinstance(kind, partial):
        raise TypeError(f"{name} has its order in its name, got order={options['order']!r}")
    return kind(schedule, steps=steps, **options)
