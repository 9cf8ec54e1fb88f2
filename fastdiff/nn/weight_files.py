"""Read the weights of a model folder, whose files have diffusers' names.

    diffusion_pytorch_model.safetensors                 all weights in one file, or
    diffusion_pytorch_model.safetensors.index.json      the name of the shard of each weight, and
    diffusion_pytorch_model-00001-of-00002.safetensors  the shards, beside the index

A variant, such as fp16, is an additional part of each of these names.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastdiff.common import json_file

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"

# Names of an index with a variant: diffusers' present name, its former name, and the name that
# follows that of a single file.
_VARIANT_INDICES = (
    f"{WEIGHTS}.index.{{}}.json",
    f"{WEIGHTS}.{{}}.index.json",
    f"{STEM}.{{}}.safetensors.index.json",
)
_VARIANT_WEIGHTS = f"{STEM}.{{}}.safetensors"
_VARIANT = re.compile(r"[^./\\]+")
_SHARD = re.compile(r".*-\d+-of-\d+")
_SHARD_NAME = re.compile(r"[\w.+ -]+\.safetensors")  # a file beside the index, never another folder
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """All tensors of a model folder, by name.

    Args:
        folder: an existing folder.
        variant: None reads the weights without a variant. If there are only weights of one variant,
            None reads those, with a warning.

    Raises:
        FileNotFoundError: there are no weights of that variant in safetensors format, or a shard
            that the index names is missing.
        ValueError: the variant cannot be part of a file's name, or the index is damaged, names
            files in other folders, or disagrees with its shards.
        SafetensorError: a file is damaged; the text begins with its name.
    """
    path = _find(folder, variant)
    return _read_shards(path) if path.suffix == ".json" else _load(path)


def _find(folder: Path, variant: str | None) -> Path:
    """The index of a variant's shards if there is one, else the variant's single file."""
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise ValueError(f"variant must be a part of a file's name such as fp16, got {variant!r}")
    if path := _existing(folder, variant):
        return path
    variants = _variants(folder)
    if variant is None and len(variants) == 1:
        path = _existing(folder, variants[0])
        assert path is not None
        warnings.warn(
            f"fastdiff: {folder} has weights of the variant {variants[0]} only, which were "
            f"loaded; variant={variants[0]!r} does so without this warning",
            stacklevel=5,  # the caller of from_pretrained
        )
        return path
    raise FileNotFoundError(_why_none(folder, variant, variants))


def _existing(folder: Path, variant: str | None) -> Path | None:
    if variant is None:
        names: tuple[str, ...] = (INDEX, WEIGHTS)
    else:
        names = tuple(name.format(variant) for name in (*_VARIANT_INDICES, _VARIANT_WEIGHTS))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _variants(folder: Path) -> list[str]:
    """The variants whose weights are in a folder, sorted."""
    patterns = [
        re.compile(re.escape(name).replace(r"\{\}", f"({_VARIANT.pattern})"))
        for name in (*_VARIANT_INDICES, _VARIANT_WEIGHTS)
    ]
    matches = [pattern.fullmatch(entry.name) for entry in folder.iterdir() for pattern in patterns]
    return sorted({m[1] for m in matches if m and not _SHARD.fullmatch(m[1])})


def _why_none(folder: Path, variant: str | None, variants: list[str]) -> str:
    """The error for a folder without the wanted weights: what it holds instead, and what to do."""
    text = f"no {WEIGHTS if variant is None else _VARIANT_WEIGHTS.format(variant)} in {folder}"
    if variant is not None and _existing(folder, None):
        text += "; it has weights without a variant: leave variant out"
    if variants:
        text += f"; it has the variants {', '.join(variants)}: say variant={variants[0]!r}"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    pickled = [name for name in names if name.endswith(_PICKLED)]
    tensors = [name for name in names if name.endswith(".safetensors")]
    if any(_SHARD.fullmatch(Path(name).stem) for name in tensors):
        text += f"; it has shards of the weights, but no {INDEX}"
    elif tensors and not variants:
        text += f"; it has {', '.join(tensors)}: rename it if these are the model's weights"
    elif pickled:
        text += (
            f"; it has {', '.join(pickled)}: pickled weights, which are never read, since a pickle "
            "can run any code. To convert weights that you trust: safetensors.torch.save_file("
            f"torch.load({str(folder / pickled[0])!r}, weights_only=True), "
            f"{str(folder / WEIGHTS)!r})"
        )
    return text


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards; ValueError if a shard lacks, or adds to, what the index lists."""
    tensors: dict[str, Tensor] = {}
    for name, wanted in _shards(index).items():
        path = index.with_name(name)
        if not path.is_file():
            raise FileNotFoundError(f"no {name} in {index.parent}, which {index.name} names")
        shard = _load(path)
        for problem, keys in (("lacks", wanted - set(shard)), ("also holds", set(shard) - wanted)):
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise ValueError(f"{path} {problem} {min(keys)}{more}, against {index.name}")
        tensors |= shard
    return tensors


def _shards(index: Path) -> dict[str, set[str]]:
    """The names of the tensors in each shard, from an index that anyone may have written."""
    names = json_file.read(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} must have a weight_map of tensors' names to files' names")
    shards: dict[str, set[str]] = {}
    for tensor, shard in names.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise ValueError(
                f"{index}: {tensor} must be in a .safetensors file beside it, got {shard!r}"
            )
        shards.setdefault(shard, set()).add(tensor)
    return shards


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise SafetensorError(f"{path.name}: {error}") from None
