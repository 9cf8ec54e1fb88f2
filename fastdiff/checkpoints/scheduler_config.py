"""What a diffusers scheduler says of a model's training: schedule, prediction and variance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff import schedules
from fastdiff.checkpoints.folder import read_json
from fastdiff.common.errors import CheckpointError
from fastdiff.schedules import NoiseSchedule

CONFIG = "scheduler_config.json"
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid_betas",
}
# The constructors' defaults, which a config.json may leave out.
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "rescale_betas_zero_snr": False,
}


@dataclass(frozen=True)
class Training:
    """What a model was trained on.

    Attributes:
        forward: the schedule.
        prediction: eps, x0 or v.
        variance: of the reverse steps, if the model predicts it: learned or learned_range.
    """

    forward: NoiseSchedule
    prediction: str
    variance: str | None


def find(folder: Path) -> Path | None:
    """The file of a pipeline's scheduler, or of a scheduler beside a model; None without one."""
    places = (folder / "scheduler" / CONFIG, folder / CONFIG)
    return next((path for path in places if path.is_file()), None)


def read(path: Path) -> Training:
    """What a scheduler_config.json says.

    Raises:
        CheckpointError: a scheduler of another kind of process, or values out of range.
    """
    values = {**_DEFAULTS, **read_json(path)}
    kind = values.get("_class_name")
    if not str(kind).startswith(_DISCRETE) or values.get("use_flow_sigmas"):
        raise CheckpointError(f"{path} describes a {kind}, which has no betas")
    prediction, name = values["prediction_type"], values["beta_schedule"]
    if prediction not in _PREDICTIONS:
        raise CheckpointError(f"{path}: unknown prediction_type {prediction!r}")
    if name not in _SCHEDULES and values["trained_betas"] is None:
        raise CheckpointError(f"{path}: unknown beta_schedule {name!r}")
    try:
        forward = _schedule(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: unusable schedule: {error}") from None
    variance = values["variance_type"]
    learned = variance in ("learned", "learned_range")
    return Training(forward, _PREDICTIONS[prediction], variance if learned else None)


# Schedulers of diffusers whose process is that of DDPM, by the beginnings of their names.
_DISCRETE = (
    "DDPM", "DDIM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestral", "HeunDiscrete",
    "KDPM2", "DPMSolver", "UniPC", "DEIS",
)  # fmt: skip


def _schedule(values: Mapping[str, Any]) -> NoiseSchedule:
    zero = bool(values["rescale_betas_zero_snr"])
    if values["trained_betas"] is not None:
        schedule = NoiseSchedule(values["trained_betas"])
        return schedules.rescale_zero_terminal_snr(schedule) if zero else schedule
    name = _SCHEDULES[values["beta_schedule"]]
    ends = {} if name == "cosine" else {key: values[key] for key in ("beta_start", "beta_end")}
    return schedules.make(name, values["num_train_timesteps"], zero_terminal_snr=zero, **ends)
