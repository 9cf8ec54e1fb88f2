"""Samplers of the reverse process: each writes a coefficient table, one row a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdiff.samplers.ddim import DDIM
from fastdiff.samplers.ddpm import DDPM
from fastdiff.samplers.table import COLUMNS, Sampler
from fastdiff.samplers.timesteps import SPACINGS, spaced_timesteps
from fastdiff.schedules import NoiseSchedule

__all__ = ["COLUMNS", "DDIM", "DDPM", "SPACINGS", "Sampler", "make", "names", "spaced_timesteps"]

_REGISTRY: dict[str, Callable[..., Sampler]] = {"ddim": DDIM, "ddpm": DDPM}


def names() -> tuple[str, ...]:
    """Names that :func:`make` knows."""
    return tuple(_REGISTRY)


def make(name: str, schedule: NoiseSchedule, steps: int, **options: Any) -> Sampler:
    """The sampler of that name for ``steps`` steps of ``schedule``.

    Raises:
        ValueError: unknown name, or options that the sampler refuses.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown sampler {name!r}, wanted one of {', '.join(_REGISTRY)}")
    return _REGISTRY[name](schedule, steps=steps, **options)
