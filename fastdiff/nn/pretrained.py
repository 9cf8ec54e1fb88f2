"""Model folders in diffusers' format: config.json and weights, alone or inside a pipeline."""

from __future__ import annotations

import json
import re
import reprlib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.common import json_file
from fastdiff.common.tensor_file import save_file
from fastdiff.nn import weight_files
from fastdiff.nn.config import UNet2DConfig
from fastdiff.nn.weight_files import INDEX, WEIGHTS
from fastdiff.nn.wrappers import plain_names

CONFIG, PIPELINE, UNET = "config.json", "model_index.json", "unet"

# Keys that diffusers' EMAModel adds to the model's options to record how it averages.
_AVERAGING = frozenset(
    {
        "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup",
        "inv_gamma", "power",
    }
)  # fmt: skip
_OLD_ATTENTION = re.compile(r"(attentions\.\d+\.)(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class NetworkConfig(Protocol):
    """The configuration of a network; it is made of the options as keyword arguments."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkConfig:
        """From the contents of a config.json; ValueError for what it does not allow."""

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json, whose _class_name is that of the network."""


def network_of(folder: Path) -> str:
    """The class of the network that a model folder describes, ``UNet2DModel`` if it does not say.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: the file holds no JSON object.
    """
    return str(json_file.read(_config_path(folder)).get("_class_name", UNet2DConfig.network))


def model_folder(folder: Path, subfolder: str | None) -> Path:
    """The folder of a model, which may be inside a pipeline's folder.

    Args:
        folder: of a model, or of a pipeline, whose part named unet is then the model.
        subfolder: a folder inside ``folder`` to use as it is; None to decide as above.
    """
    if subfolder is not None:
        return folder / subfolder
    part = folder / UNET
    pipeline = (folder / PIPELINE).is_file() or not (folder / CONFIG).is_file()
    return part if pipeline and (part / CONFIG).is_file() else folder


def read_config(
    folder: Path, ignore: Collection[str] = (), config_class: type[Any] = UNet2DConfig
) -> Any:
    """The configuration in a model folder.

    Keys that are not options of the model are skipped if they cannot change the result: keys that
    begin with _ silently; keys of diffusers' EMAModel and keys whose value is None or False with a
    warning. (diffusers gives a new option the value None or False for "off", so that older
    configurations keep their meaning. If the option changes the set of weights, the weights do not
    fit, which is an error.)

    Args:
        folder: of the model.
        ignore: keys to skip silently, whatever their values.
        config_class: the class of the configuration, a dataclass with a ``network``.

    Returns:
        A ``config_class``.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: the file holds no JSON object, describes another class, has another key that is
            no option of the model, or has values that ``config_class`` refuses; or ``ignore`` names
            an option of the model.
    """
    network, options = config_class.network, {field.name for field in fields(config_class)}
    if isinstance(ignore, str) or options & set(ignore):
        raise ValueError(f"ignore must hold keys that are no options of the model, got {ignore!r}")
    path = _config_path(folder)
    values = json_file.read(path)
    kind = values.get("_class_name", UNet2DConfig.network)
    if kind != network:
        raise ValueError(f"{path} describes a {kind}, wanted a {network}")
    unknown = {
        key: value
        for key, value in values.items()
        if key not in options and key not in ignore and not key.startswith("_")
    }
    risky = [
        key
        for key, value in unknown.items()
        if key not in _AVERAGING and value is not None and value is not False
    ]
    if risky:
        raise ValueError(
            f"{path}: {network} has no option {_listed(unknown, risky)}, which may change what "
            f"the model computes; if you know that it does not, pass ignore={tuple(risky)!r}"
        )
    if unknown:
        warnings.warn(
            f"fastdiff: {path} has keys that are no options of {network} and were skipped: "
            f"{_listed(unknown, sorted(unknown))}",
            stacklevel=3,  # the caller of from_pretrained
        )
    return config_class.from_dict({key: values[key] for key in values if key in options})


def read_weights(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors in a model folder, under diffusers' present names.

    Raises:
        ValueError: a layer has weights under its old and its new name, or ``weight_files.read``
            raises it.
        FileNotFoundError, SafetensorError: see ``weight_files.read``.
    """
    return current_names(weight_files.read(folder, variant), folder)


def current_names(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Tensors of the file or folder ``source`` under diffusers' present names.

    Checkpoints of diffusers' first releases name the attention's layers query, key, value and
    proj_attn; here these are renamed.

    Raises:
        ValueError: a layer has weights under its old and its new name.
    """
    tensors = plain_names(tensors)

    def renamed(match: re.Match[str]) -> str:
        return f"{match[1]}{_NEW_ATTENTION[match[2]]}."

    current = {_OLD_ATTENTION.sub(renamed, name): value for name, value in tensors.items()}
    if len(current) < len(tensors):
        raise ValueError(f"{source} has weights of an attention under their old and new names both")
    return current


def write(folder: Path, config: NetworkConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and a file of weights into a folder, which is created if it is missing.

    Existing files of these names are replaced. An index of shards, which would be read in place of
    the new weights, is deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    contiguous = {name: value.detach().contiguous() for name, value in plain_names(tensors).items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / INDEX).unlink(missing_ok=True)


class NoInitialisation(TorchFunctionMode):
    """A mode under which new modules do not initialise their weights, since these are replaced.

    It is also for the meta device, which has nothing to fill: there init.normal_ would import the
    compiler, which takes 1 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run every call except those to torch.nn.init, whose results are not used."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def check_names_and_shapes(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError unless ``weights`` have the names and shapes of ``wanted``, in floating point."""
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [f"{name} is not the model's" for name in weights if name not in wanted]
    problems += [
        f"{name} must have shape {_shape(wanted[name])}, got {_shape(value)}"
        for name, value in weights.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    problems += [
        f"{name} must be floating point, got {value.dtype}"
        for name, value in weights.items()
        if not value.is_floating_point()  # for example the weights of a quantized model
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the weights do not fit the config: {'; '.join(problems[:3])}{more}")


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _listed(values: Mapping[str, Any], keys: Collection[str]) -> str:
    """Keys with their values, long values shortened."""
    return ", ".join(f"{key} ({reprlib.repr(values[key])})" for key in keys)


def _config_path(folder: Path) -> Path:
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file: give the folder that it is in")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} to read a model from (local folders only)")
    if (folder / CONFIG).is_file():
        return folder / CONFIG
    text = f"no {CONFIG} in {folder}"
    parts = sorted(config.parent.name for config in folder.glob(f"*/{CONFIG}"))
    if (folder / PIPELINE).is_file():
        text += f", which is a pipeline without a part named {UNET}"
    if parts:
        text += f"; these parts have one, to be passed as subfolder: {', '.join(parts)}"
    raise FileNotFoundError(text)
