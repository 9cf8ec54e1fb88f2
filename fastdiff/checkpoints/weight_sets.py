"""Find the weights in what a training program saved: a network's own and their average.

the object                                    who saves it
{name: tensor}                                improved-diffusion, guided-diffusion
{"state_dict": {...}, ...}                    PyTorch Lightning (latent diffusion)
{"model": {...}, "ema": {...}, ...}           lucidrains, and many training loops
{"model": {...}, "ema": {"shadow_params"}}    score_sde: a list in the order of the parameters
[{...}, optimizer, epoch, step, {...}]        ddim, the average last
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import Tensor

from fastdiff.common.errors import CheckpointError

State = Mapping[str, Tensor]

_MODEL_KEYS = ("state_dict", "model_state_dict", "model", "unet", "net")
_EMA_KEYS = ("ema", "ema_state_dict", "model_ema", "ema_model")
_SHADOW = "shadow_params"
_LIGHTNING_EMA = "model_ema."  # latent diffusion keeps the average of model.* under these names
# Buffers of the modules that score_sde averages; its list of averages has parameters alone.
_BUFFERS = ("sigmas",)


def pick(value: Any, *, ema: bool) -> dict[str, Tensor]:
    """The weights in the object of a file.

    Args:
        value: what was saved.
        ema: the average instead of the network's own weights.

    Raises:
        CheckpointError: there are no weights in it, or no average of them.
    """
    model, average = _both(value)
    if not ema:
        if model is None:
            raise CheckpointError(f"holds no weights of a network, but {_described(value)}")
        return dict(model)
    if average is None:
        raise CheckpointError(
            f"holds no averaged weights (ema), but {_described(value)}; programs that save the "
            "average as a file of its own, such as ema_0.9999_500000.pt, need no ema"
        )
    return dict(average)


def has_average(value: Any) -> bool:
    """Whether the object of a file also has averaged weights."""
    return _both(value)[1] is not None


def _both(value: Any) -> tuple[State | None, State | None]:
    """The network's own weights and their average, None for what is not there."""
    if isinstance(value, (list, tuple)):
        states = [part for part in value if _is_state(part)]
        return states[0] if states else None, states[-1] if len(states) > 1 else None
    if not isinstance(value, Mapping):
        return None, None
    if _is_state(value):
        return value, _squashed(value)
    model = next((value[key] for key in _MODEL_KEYS if _is_state(value.get(key))), None)
    average = next((value[key] for key in _EMA_KEYS if value.get(key)), None)
    if isinstance(average, Mapping) and isinstance(average.get(_SHADOW), list) and model:
        return model, _named(average[_SHADOW], model)
    if model and not _is_state(average):
        return model, _squashed(model)
    return model, average if _is_state(average) else None


def _is_state(value: Any) -> TypeGuard[State]:
    """Whether a value is a dictionary of tensors by name."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and all(isinstance(part, Tensor) for part in value.values())
    )


def _squashed(state: State) -> State | None:
    """The average that latent diffusion saves beside the weights, its names without their dots."""
    average = {}
    for name in state:
        kept = _LIGHTNING_EMA + name.removeprefix("model.").replace(".", "")
        if name.startswith("model.") and kept in state:
            average[name] = state[kept]
    return average or None


def _named(values: list[Any], model: State) -> State:
    """score_sde's list of averages, by the names of the parameters in the same order."""
    names = [name for name in model if name.rpartition(".")[2] not in _BUFFERS]
    if len(values) != len(names) or not all(isinstance(value, Tensor) for value in values):
        raise CheckpointError(
            f"has a list of {len(values)} averaged weights for {len(names)} parameters"
        )
    return dict(zip(names, values, strict=True))


def _described(value: Any) -> str:
    """What the object of a file is, for an error."""
    if isinstance(value, Mapping):
        keys = [str(key) for key in value]
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        return f"a dictionary with {', '.join(keys[:6]) or 'nothing'}{more}"
    return f"a {type(value).__name__}"
