"""Model folders as diffusers has them: config.json and diffusion_pytorch_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.nn.config import CLASS_NAME, UNet2DConfig

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

_OLD_ATTENTION = re.compile(r"(attentions\.\d+\.)(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_config(folder: Path) -> UNet2DConfig:
    """The configuration in a model folder.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: the file is no JSON object, is another class's, or see ``UNet2DConfig``.
    """
    path = _existing(folder, CONFIG)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    kind = values.get("_class_name", CLASS_NAME)
    if kind != CLASS_NAME:
        raise ValueError(f"{path} describes a {kind}, wanted a {CLASS_NAME}")
    return UNet2DConfig.from_dict(values)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors in a model folder, under today's names.

    Checkpoints of diffusers' first releases name the attention's layers query, key, value and
    proj_attn.

    Raises:
        FileNotFoundError: no such folder, or no safetensors file in it.
        SafetensorError: the file is damaged.
    """
    tensors = load_file(_existing(folder, WEIGHTS))

    def renamed(match: re.Match[str]) -> str:
        return f"{match[1]}{_NEW_ATTENTION[match[2]]}."

    return {_OLD_ATTENTION.sub(renamed, name): value for name, value in tensors.items()}


def write(folder: Path, config: UNet2DConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a model folder; it is made if need be, and files of these names are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})


class NoInitialisation(TorchFunctionMode):
    """Modules made under it keep their weights as they come, to be replaced at once.

    On the meta device there is nothing to fill, but init.normal_ would import the compiler: 1 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every call on but those to torch.nn.init, whose results nobody uses."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def check_names_and_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError unless both have the same names with the same shapes."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not the model's" for name in found if name not in wanted]
    problems += [
        f"{name} must have shape {_shape(wanted[name])}, got {_shape(value)}"
        for name, value in found.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the weights do not fit the config: {'; '.join(problems[:3])}{more}")


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} to read a model from (local folders only)")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"no {name} in {folder}")
    return folder / name
