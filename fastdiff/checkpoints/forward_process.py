"""Forward processes as JSON, for checkpoints.

A NoiseSchedule is recorded under the key "schedule": by its name and options if these reproduce it,
else by its betas. Every other process is recorded under "forward", by its name and options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff import schedules, sde
from fastdiff.checkpoints.folder import field
from fastdiff.common.errors import CheckpointError, InputError
from fastdiff.objectives import Forward
from fastdiff.schedules import FlowSchedule, NoiseSchedule

RESCALE = "rescale_timesteps"  # the option of schedules by name and by betas
# For each name its class, and for each option of the constructor the attribute that holds it.
_TIMES = {"smallest": "smallest", "trained_from": "trained_from"}
_LOG_SNR = {"log_snr_max": "log_snr_max", "log_snr_min": "log_snr_min"}
_KINDS: dict[str, tuple[Callable[..., Forward], dict[str, str]]] = {
    "vp": (sde.VP, {"beta_min": "beta_min", "beta_max": "beta_max", **_TIMES}),
    "subvp": (sde.SubVP, {"beta_min": "beta_min", "beta_max": "beta_max", **_TIMES}),
    "ve": (
        sde.VE,
        {"sigma_min": "sigma_min", "sigma_max": "sigma_max", "label_by": "label_by", **_TIMES},
    ),
    "edm": (sde.EDM, {"sigma_min": "smallest", "sigma_max": "end", "sigma_data": "sigma_data"}),
    "linear-log-snr": (sde.LinearLogSNR, _LOG_SNR),
    "learned-log-snr": (sde.LearnedLogSNR, {**_LOG_SNR, "hidden": "hidden"}),
    "cosine-log-snr": (sde.CosineLogSNR, {**_LOG_SNR, "shift": "shift"}),
    "flow": (
        FlowSchedule,
        {"num_timesteps": "num_timesteps", "shift": "shift", "label_by": "label_by"},
    ),
}
# Values of options in checkpoints that are older than the option.
_UNRECORDED: dict[str, dict[str, Any]] = {
    "vp": dict.fromkeys(_TIMES, 1e-3),
    "subvp": dict.fromkeys(_TIMES, 1e-3),
    "ve": {**dict.fromkeys(_TIMES, 1e-5), "label_by": "time"},
    "flow": {"label_by": "timestep"},
}


def describe(forward: Forward) -> dict[str, Any]:
    """A forward process as a JSON object of one entry, "schedule" or "forward".

    Raises:
        InputError: a process that cannot be recorded, such as a schedule seen in continuous time.
    """
    if isinstance(forward, NoiseSchedule):
        described = {"name": forward.name, "num_timesteps": forward.num_timesteps}
        rescaled = {RESCALE: True} if forward.rescale_timesteps else {}
        if _can_be_remade(forward):
            return {"schedule": {**described, "options": {**forward.options, **rescaled}}}
        return {"schedule": {**described, "betas": forward.betas.tolist(), **rescaled}}
    for name, (kind, options) in _KINDS.items():
        if type(forward) is kind:
            values = {option: getattr(forward, attribute) for option, attribute in options.items()}
            learned = {}
            if isinstance(forward, sde.LearnedLogSNR):
                state = forward.network.state_dict()
                learned = {"weights": {key: value.tolist() for key, value in state.items()}}
            return {"forward": {"name": name, "options": values, **learned}}
    raise InputError(f"a checkpoint cannot record the forward process {forward!r}")


def read(meta: Mapping[str, Any], path: Path) -> Forward:
    """The forward process in the JSON object ``meta`` of the file ``path``.

    Raises:
        CheckpointError: there is none, there are two, or it is not valid.
    """
    if "schedule" in meta and "forward" in meta:
        raise CheckpointError(f"{path}: both a 'schedule' and a 'forward' process")
    return _process(meta, path) if "forward" in meta else _schedule(meta, path)


def _process(meta: Mapping[str, Any], path: Path) -> Forward:
    described = field(meta, "forward", dict, path)
    name = field(described, "name", str, path)
    if name not in _KINDS:
        raise CheckpointError(f"{path}: unknown forward process {name!r}")
    options = field(described, "options", dict, path)
    (kind, wanted), defaults = _KINDS[name], _UNRECORDED.get(name, {})
    required = [option for option in wanted if option not in defaults]
    if not set(required) <= set(options) <= set(wanted):
        raise CheckpointError(
            f"{path}: the forward process {name} has the options {', '.join(required)}, "
            f"got {', '.join(options) or 'none'}"
        )
    options = {**defaults, **options}
    for option, value in options.items():
        if option == "label_by":
            continue  # a name, which the constructor checks
        whole = option in ("num_timesteps", "hidden")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            number = "whole number" if whole else "number"
            raise CheckpointError(f"{path}: {option!r} must be a {number}, got {value!r}")
    try:
        forward = kind(**options)
        if isinstance(forward, sde.LearnedLogSNR):
            _set_weights(forward.network, field(described, "weights", dict, path))
        return forward
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: unusable forward process: {error}") from None


def _set_weights(network: nn.Module, weights: Mapping[str, Any]) -> None:
    """Give a process's network recorded weights, which are not trained; errors if they differ."""
    state = {
        key: torch.tensor(value, dtype=torch.float64, device="cpu")
        for key, value in weights.items()
    }
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise ValueError("weights that are not finite")
    network.load_state_dict(state)
    network.requires_grad_(False)


def _schedule(meta: Mapping[str, Any], path: Path) -> NoiseSchedule:
    described = field(meta, "schedule", dict, path)
    name = field(described, "name", str, path)
    try:
        if "betas" in described:
            rescaled = field({RESCALE: False, **described}, RESCALE, bool, path)
            return NoiseSchedule(described["betas"], name=name, rescale_timesteps=rescaled)
        options = field(described, "options", dict, path)
        count = field(described, "num_timesteps", int, path)
        return schedules.make(name, count, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: unusable schedule: {error}") from None


def _can_be_remade(schedule: NoiseSchedule) -> bool:
    """Whether the schedule's name and options reproduce its betas."""
    if schedule.name not in schedules.NAMES:
        return False
    try:
        made = schedules.make(schedule.name, schedule.num_timesteps, **schedule.options)
    except (TypeError, ValueError):  # a caller's own betas under a well-known name
        return False
    return torch.equal(made.betas, schedule.betas)
