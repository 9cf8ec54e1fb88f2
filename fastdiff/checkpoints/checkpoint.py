"""Checkpoints: a folder that fastdiff and diffusers both read, written whole or not at all.

    config.json, diffusion_pytorch_model.safetensors   the (averaged) model in diffusers' format
    diffusion_pytorch_model.NAME.safetensors           other averages, see ``named_weights``
    fastdiff.json                                      process, prediction, classes and origin
    training_state.safetensors, training.json          for resuming; not in exported checkpoints

A training run keeps its checkpoints at OUT/checkpoints/step-00001000. No file is pickled.
"""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastdiff.checkpoints import forward_process, named_weights
from fastdiff.checkpoints.folder import (
    FORMAT,
    check_format,
    checksums,
    damaged,
    field,
    new_folder,
    not_finite,
    optional_field,
    read_json,
    read_tensors,
    write_json,
)
from fastdiff.checkpoints.named_weights import STATE
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import CheckpointError, DamagedError, InputError
from fastdiff.common.tensor_file import save_file
from fastdiff.nn import ImageNetwork, networks
from fastdiff.nn.wrappers import plain_names, plain_state, unwrapped

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
META, TRAINING = "fastdiff.json", "training.json"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

CHECKSUMS = "sha256"  # the entry of TRAINING with the checksums of the tensors' files

_STEP = re.compile(r"step-(\d+)")


def load(path: str | Path, weights: str | None = None) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: the name of a model shipped with fastdiff ("digits" or "emoji"), a checkpoint folder,
            or the folder of a training run, whose newest checkpoint is read. The name of a shipped
            model has precedence over a folder of the same name; write ./digits for the folder.
        weights: the name of the weights to read: of an average that the run kept, such as
            ema-0.9999 or std-0.05, or "raw" for the weights of the last step, which are in a
            training run's checkpoints; None for the average that the run calls its model.

    Returns:
        The checkpoint on the CPU, its model in eval mode and float32 whatever the file holds.

    Raises:
        CheckpointError: there is no checkpoint, no weights of that name, or its files are damaged,
            of another program or of another format; the text names the file.
    """
    folder = resolve(path)
    meta = read_json(folder / META)
    check_format(meta, folder / META)
    forward = forward_process.read(meta, folder / META)
    model = _read_model(folder, named_weights.read(folder, meta, folder / META, weights))
    checkpoint = Checkpoint(
        model,
        forward,
        field(meta, "prediction", str, folder / META),
        classes=tuple(map(str, field(meta, "classes", list, folder / META))),
        step=field(meta, "step", int, folder / META),
        seed=field(meta, "seed", int, folder / META),
        dataset=field(meta, "dataset", str, folder / META),
        null_class=field({"null_class": False, **meta}, "null_class", bool, folder / META),
        objective=optional_field(meta, "objective", str, folder / META),
        variance=optional_field(meta, "variance", str, folder / META),
        levels=optional_field(meta, "levels", int, folder / META),
        weights=weights or optional_field(meta, "weights", str, folder / META),
        few_steps=optional_field(meta, "few_steps", int, folder / META),
    )
    try:
        outputs = checkpoint.channels * (2 if checkpoint.diffusion().objective.learned else 1)
    except InputError as error:
        raise CheckpointError(f"{folder / META}: {error}") from None
    classes = len(checkpoint.classes) + checkpoint.null_class
    for key, recorded, name in (
        ("image_size", _recorded_size(meta, folder / META), "sample_size"),
        ("channels", field(meta, "channels", int, folder / META), "image_channels"),
        ("classes", classes or None, "num_class_embeds"),
        ("channels and variance", outputs, "out_channels"),
    ):
        value = getattr(model.config, name)
        if recorded != value:
            raise CheckpointError(
                f"{folder}: {META} and {CONFIG} disagree: {key} is {recorded}, {name} is {value}"
            )
    return checkpoint


def read_weights(folder: str | Path, name: str, like: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights of a checkpoint's further average, by parameter, without building a model.

    Args:
        folder: the checkpoint.
        name: of the average.
        like: the model's own weights, whose names and shapes are wanted.

    Raises:
        CheckpointError: there are no weights of that name beside the model's own, or they are of
            another model, damaged, or not finite.
    """
    path = Path(folder) / META
    weights = named_weights.read(path.parent, read_json(path), path, name)
    if weights is None:
        raise CheckpointError(f"{folder}: {name} is the average of the model itself")
    given, wanted = ({k: v.shape for k, v in state.items()} for state in (weights, like))
    if given != wanted:
        other = next(k for k in [*given, *wanted] if given.get(k) != wanted.get(k))
        raise CheckpointError(
            f"{folder}: {other} of {name} has shape {_shape(given, other)}, the model's has "
            f"{_shape(wanted, other)}"
        )
    if wrong := not_finite(weights):
        raise DamagedError(f"{folder}: {wrong} of {name} has NaN or infinity")
    return weights


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "none"


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that ``path`` names, as :func:`load` understands it."""
    if str(path) in shipped():
        return PRETRAINED / str(path)
    folder = Path(path)
    if (folder / META).is_file():
        return folder
    latest = newest(folder)
    if latest is not None:
        return latest
    if not folder.exists():
        names = "".join(f", and no shipped model has that name ({n})" for n in shipped()[:1])
        raise CheckpointError(f"no checkpoint at {folder}: no such folder{names}")
    raise CheckpointError(
        f"{folder} is not a fastdiff checkpoint: it has no {META}{_what_it_is(folder)}"
    )


def _what_it_is(folder: Path) -> str:
    """The end of the error for a path that is no checkpoint: what it is, and how to use that."""
    if folder.is_file():
        return "; it is a file: give its folder, or make a checkpoint of it by fastdiff convert"
    if (folder / "classifier.json").is_file():
        return "; it holds a classifier, which guides a checkpoint's model"
    names = ("model_index.json", CONFIG, f"unet/{CONFIG}")
    if any((folder / name).is_file() for name in names):
        return (
            ", which says on what process a model was trained and what it predicts. It holds a "
            "model of diffusers: make a checkpoint of it by fastdiff convert"
        )
    return ""


def shipped() -> tuple[str, ...]:
    """Names of the models that are shipped with fastdiff."""
    return tuple(sorted(meta.parent.name for meta in PRETRAINED.glob(f"*/{META}")))


def all_steps(out: str | Path) -> list[Path]:
    """Checkpoints of a training run, oldest first."""
    folders = []
    for folder in Path(out).glob("checkpoints/step-*"):
        match = _STEP.fullmatch(folder.name)
        if match and folder.is_dir():
            folders.append((int(match[1]), folder))
    return [folder for _, folder in sorted(folders)]


def step_of(folder: Path) -> int:
    """The step in the name of a folder of :func:`all_steps`."""
    return int(folder.name.removeprefix("step-"))


def newest(out: str | Path) -> Path | None:
    """The newest checkpoint of a training run, or None."""
    return next(reversed(all_steps(out)), None)


def step_folder(out: str | Path, step: int) -> Path:
    """The folder in which a training run keeps its checkpoint of ``step``."""
    return Path(out) / "checkpoints" / f"step-{step:08d}"


def save(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    state: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None,
    averages: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a checkpoint as a new folder, flushed to disk; after an error there is no folder.

    Args:
        checkpoint: what to write.
        folder: the folder to create; must not exist.
        dtype: of the model's weights in the file.
        state: tensors and JSON values for resuming the training, see :func:`read_state`.
        averages: further weights of the model, by their name and the parameters' names.

    Raises:
        CheckpointError: the folder exists, weights are not finite in ``dtype``, or the file system
            refused the write. Nothing that existed before is changed.
    """
    with _model_folder(checkpoint.model, Path(folder), dtype) as staging:
        write_json(staging / META, _meta(checkpoint) | {"averages": list(averages or ())})
        named_weights.write(staging, averages or {})
        if state is not None:
            tensors, facts = state
            contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
            save_file(contiguous, staging / STATE)
            sums = {CHECKSUMS: checksums(staging)}
            write_json(staging / TRAINING, {"format": FORMAT, **sums, **facts})


@contextmanager
def _model_folder(model: ImageNetwork, folder: Path, dtype: torch.dtype) -> Iterator[Path]:
    """A new folder, as ``folder.new_folder`` makes it, with a model in diffusers' format."""
    model = unwrapped(model)
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    if name := not_finite(plain_state(model)):
        raise CheckpointError(f"not written: {name} is not finite in {dtype}")
    with new_folder(folder) as staging:
        model.save_pretrained(staging)
        yield staging


def save_model(
    model: ImageNetwork, folder: str | Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a model of which nothing but its weights is known as a new folder: see :func:`save`."""
    with _model_folder(model, Path(folder), dtype):
        pass


def export(checkpoint: Checkpoint, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint for sharing, without its training state: see :func:`save`."""
    save(checkpoint, folder, dtype=dtype)


def read_state(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and JSON values that :func:`save` was given as ``state``.

    Raises:
        CheckpointError: the checkpoint was exported without a training state, or it is damaged.
    """
    return plain_names(read_tensors(Path(folder) / STATE)), read_facts(folder)


def read_facts(folder: str | Path) -> dict[str, Any]:
    """The JSON values of :func:`read_state`, without its tensors."""
    path = Path(folder) / TRAINING
    if not path.is_file():
        raise CheckpointError(f"{folder} cannot be resumed: it has no {TRAINING}")
    facts = read_json(path)
    check_format(facts, path)
    return facts


def prune(out: str | Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints of a run, and folders of unfinished writes.

    A folder that cannot be deleted is left, with a warning.
    """
    for folder in (*all_steps(out)[:-keep], *Path(out).glob("checkpoints/.step-*.partial")):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            warnings.warn(
                f"fastdiff: cannot delete the old checkpoint {folder}: {error.strerror or error}",
                stacklevel=2,
            )


def _meta(checkpoint: Checkpoint) -> dict[str, Any]:
    _, *sizes = checkpoint.shape
    several = isinstance(unwrapped(checkpoint.model).config.sample_size, tuple)
    return {
        "format": FORMAT,
        **forward_process.describe(checkpoint.forward),
        "prediction": checkpoint.prediction,
        "objective": checkpoint.objective,
        "variance": checkpoint.variance,
        "levels": checkpoint.levels,
        "image_size": sizes if several else sizes[0],
        "channels": checkpoint.channels,
        "classes": list(checkpoint.classes),
        "null_class": checkpoint.null_class,
        "step": checkpoint.step,
        "seed": checkpoint.seed,
        "dataset": checkpoint.dataset,
        "weights": checkpoint.weights,
        **({} if checkpoint.few_steps is None else {"few_steps": checkpoint.few_steps}),
    }


def _recorded_size(meta: Mapping[str, Any], path: Path) -> int | tuple[int, ...]:
    """The model's sample_size, which is a list of numbers where one does not tell all sizes."""
    size = meta.get("image_size")
    return tuple(size) if isinstance(size, list) else field(meta, "image_size", int, path)


def _read_model(folder: Path, weights: Mapping[str, Tensor] | None) -> ImageNetwork:
    """The model in a folder, with other weights than its own unless they are None."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise DamagedError(f"{folder} is not a complete checkpoint: it has no {name}")
    read_json(folder / CONFIG)
    try:
        model = networks.from_pretrained(folder).float().eval()
        if weights is not None:
            model.load_state_dict(dict(weights))
    except SafetensorError as error:
        raise damaged(folder / WEIGHTS, error) from None
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise CheckpointError(f"cannot build the model of {folder}: {error}") from None
    if wrong := not_finite(model.state_dict()):
        raise DamagedError(f"{folder / WEIGHTS}: {wrong} has NaN or infinity")
    return model
