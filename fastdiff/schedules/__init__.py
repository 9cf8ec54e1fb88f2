"""Noise schedules: Gaussian paths with timesteps, and the schedules that have a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdiff.schedules import formulas
from fastdiff.schedules.formulas import (
    cosine,
    flow,
    linear,
    rescale_timesteps,
    rescale_zero_terminal_snr,
    scaled_linear,
    shifted_cosine,
    sigmoid,
    sigmoid_abar,
    sigmoid_betas,
)
from fastdiff.schedules.gaussian_path import LABELS, FlowSchedule, GaussianPath, NoiseSchedule

__all__ = [
    "LABELS", "NAMES", "RESCALABLE", "FlowSchedule", "GaussianPath", "NoiseSchedule", "cosine",
    "flow", "linear", "make", "rescale_timesteps", "rescale_zero_terminal_snr", "scaled_linear",
    "shifted_cosine", "sigmoid", "sigmoid_abar", "sigmoid_betas",
]  # fmt: skip

NAMES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "shifted_cosine": shifted_cosine,
    "sigmoid_betas": sigmoid_betas,
    "sigmoid_abar": sigmoid_abar,
    "sigmoid": sigmoid_betas,  # the name in earlier versions
}
# Schedules with the option ``rescaled``.
RESCALABLE = ("linear", "scaled_linear", "sigmoid_betas", "sigmoid")


def make(
    name: str,
    num_timesteps: int = 1000,
    *,
    zero_terminal_snr: bool = False,
    rescale_timesteps: bool = False,
    **options: Any,
) -> NoiseSchedule:
    """A schedule by its name in :data:`NAMES`.

    Args:
        name: linear, scaled_linear, cosine, shifted_cosine, sigmoid_betas or sigmoid_abar.
        num_timesteps: T.
        zero_terminal_snr: apply :func:`rescale_zero_terminal_snr`.
        rescale_timesteps: apply :func:`rescale_timesteps`: the network is told 1000 t / T.
        **options: further arguments of the function of that name.

    Raises:
        ValueError: an unknown name, or an option out of range.
        TypeError: an option that the schedule does not have.
    """
    if name not in NAMES:
        raise ValueError(f"unknown schedule {name!r}, wanted one of {', '.join(NAMES)}")
    schedule = NAMES[name](num_timesteps, **options)
    if zero_terminal_snr:
        schedule = rescale_zero_terminal_snr(schedule)
    return formulas.rescale_timesteps(schedule) if rescale_timesteps else schedule
