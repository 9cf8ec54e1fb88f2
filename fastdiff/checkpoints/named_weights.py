"""Further weights of a checkpoint's model, by name: other averages, and those of the last step.

diffusion_pytorch_model.ema-0.9999.safetensors   an average, as diffusers names a variant
training_state.safetensors                       the weights of the last step: "raw"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.checkpoints.folder import not_finite, optional_field, read_tensors
from fastdiff.common.errors import CheckpointError
from fastdiff.common.tensor_file import save_file
from fastdiff.nn.weight_files import STEM
from fastdiff.nn.wrappers import plain_names

STATE = "training_state.safetensors"
RAW = "raw"  # the name of the weights of the last step
MODEL = "model"  # what their names in STATE begin with, before a point

_NAME = re.compile(r"[\w.-]+")  # a part of the name of a file in the same folder

State = Mapping[str, Tensor]


def write(folder: Path, states: Mapping[str, State]) -> None:
    """Write weights by name into a checkpoint's folder.

    Raises:
        CheckpointError: a weight is not finite.
    """
    for name, state in states.items():
        if wrong := not_finite(state):
            raise CheckpointError(f"not written: {wrong} of {name} is not finite")
        tensors = {key: value.detach().contiguous() for key, value in state.items()}
        save_file(tensors, folder / _file(name))


def read(folder: Path, meta: Mapping[str, Any], path: Path, wanted: str | None) -> State | None:
    """The weights of a name.

    Args:
        folder: the checkpoint.
        meta: the JSON object in ``path`` that says which weights there are.
        path: of ``meta``, for the text of errors.
        wanted: the name; None for the model's own.

    Returns:
        The weights by the parameters' names, or None for those that are the model's own.

    Raises:
        CheckpointError: there are no weights of that name, or their file is damaged.
    """
    own = optional_field(meta, "weights", str, path)
    if wanted in (None, own):
        return None
    others = [str(name) for name in optional_field(meta, "averages", list, path) or ()]
    if wanted == RAW and (folder / STATE).is_file():
        tensors = plain_names(read_tensors(folder / STATE))
        return {k[len(MODEL) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{MODEL}.")}
    if wanted not in others or not _NAME.fullmatch(wanted):
        raw = [RAW] if (folder / STATE).is_file() else []
        names = ", ".join([*([own] if own else []), *others, *raw])
        raise CheckpointError(f"{folder} has no weights {wanted!r}, but {names or 'one set only'}")
    return read_tensors(folder / _file(wanted))


def _file(name: str) -> str:
    return f"{STEM}.{name}.safetensors"
