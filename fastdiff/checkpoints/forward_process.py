"""Forward processes as JSON, for checkpoints.

A NoiseSchedule stands under the key "schedule", by name and options where they make it again, else
by its betas; every other process under "forward", by name and options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastdiff import schedules, sde
from fastdiff.checkpoints.folder import field
from fastdiff.common.errors import CheckpointError, InputError
from fastdiff.objectives import Forward
from fastdiff.schedules import FlowSchedule, NoiseSchedule

# The options of each, in the names of its constructor, and the attributes that hold them.
_TIMES = {"smallest": "smallest", "trained_from": "trained_from"}
_KINDS: dict[str, tuple[Callable[..., Forward], dict[str, str]]] = {
    "vp": (sde.VP, {"beta_min": "beta_min", "beta_max": "beta_max", **_TIMES}),
    "subvp": (sde.SubVP, {"beta_min": "beta_min", "beta_max": "beta_max", **_TIMES}),
    "ve": (sde.VE, {"sigma_min": "sigma_min", "sigma_max": "sigma_max", **_TIMES}),
    "edm": (sde.EDM, {"sigma_min": "smallest", "sigma_max": "end", "sigma_data": "sigma_data"}),
    "flow": (
        FlowSchedule,
        {"num_timesteps": "num_timesteps", "shift": "shift", "label_by": "label_by"},
    ),
}
# What options were before checkpoints recorded them.
_ONCE: dict[str, dict[str, Any]] = {
    "vp": dict.fromkeys(_TIMES, 1e-3),
    "subvp": dict.fromkeys(_TIMES, 1e-3),
    "ve": dict.fromkeys(_TIMES, 1e-5),
    "flow": {"label_by": "timestep"},
}


def describe(forward: Forward) -> dict[str, Any]:
    """The entry of a JSON object that says what the forward process is.

    Raises:
        InputError: one that cannot be recorded, such as another process's view.
    """
    if isinstance(forward, NoiseSchedule):
        described = {"name": forward.name, "num_timesteps": forward.num_timesteps}
        if _can_be_remade(forward):
            return {"schedule": {**described, "options": forward.options}}
        return {"schedule": {**described, "betas": forward.betas.tolist()}}
    for name, (kind, options) in _KINDS.items():
        if type(forward) is kind:
            found = {option: getattr(forward, attribute) for option, attribute in options.items()}
            return {"forward": {"name": name, "options": found}}
    raise InputError(f"a checkpoint cannot record the forward process {forward!r}")


def read(meta: Mapping[str, Any], path: Path) -> Forward:
    """The forward process of the JSON object of ``path``; CheckpointError if it has none."""
    if "schedule" in meta and "forward" in meta:
        raise CheckpointError(f"{path}: both a 'schedule' and a 'forward' process")
    return _process(meta, path) if "forward" in meta else _schedule(meta, path)


def _process(meta: Mapping[str, Any], path: Path) -> Forward:
    described = field(meta, "forward", dict, path)
    name = field(described, "name", str, path)
    if name not in _KINDS:
        raise CheckpointError(f"{path}: unknown forward process {name!r}")
    options = field(described, "options", dict, path)
    (kind, wanted), once = _KINDS[name], _ONCE.get(name, {})
    required = [option for option in wanted if option not in once]
    if not set(required) <= set(options) <= set(wanted):
        raise CheckpointError(
            f"{path}: the forward process {name} has the options {', '.join(required)}, "
            f"got {', '.join(options) or 'none'}"
        )
    options = {**once, **options}
    for option, value in options.items():
        if option == "label_by":
            continue  # a name, which the constructor checks
        whole = option == "num_timesteps"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            what = "whole number" if whole else "number"
            raise CheckpointError(f"{path}: {option!r} must be a {what}, got {value!r}")
    try:
        return kind(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: unusable forward process: {error}") from None


def _schedule(meta: Mapping[str, Any], path: Path) -> NoiseSchedule:
    described = field(meta, "schedule", dict, path)
    name = field(described, "name", str, path)
    try:
        if "betas" in described:
            return NoiseSchedule(described["betas"], name=name)
        options = field(described, "options", dict, path)
        count = field(described, "num_timesteps", int, path)
        return schedules.make(name, count, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: unusable schedule: {error}") from None


def _can_be_remade(schedule: NoiseSchedule) -> bool:
    if schedule.name not in schedules.NAMES:
        return False
    try:
        made = schedules.make(schedule.name, schedule.num_timesteps, **schedule.options)
    except (TypeError, ValueError):  # a caller's own betas under a well-known name
        return False
    return torch.equal(made.betas, schedule.betas)
