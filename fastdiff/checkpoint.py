"""Checkpoints: a folder that fastdiff and diffusers both read, written whole or not at all.

    config.json, diffusion_pytorch_model.safetensors   the (averaged) model, as diffusers has it
    fastdiff.json                                      schedule, prediction, classes and origin
    training_state.safetensors, training.json          what resuming needs; not in exported ones

A training run keeps its checkpoints at OUT/checkpoints/step-00001000. Nothing here is pickled.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff import process, schedules
from fastdiff.errors import CheckpointError, InputError
from fastdiff.nn import UNet2DModel
from fastdiff.samplers import Sampler
from fastdiff.sampling import sample
from fastdiff.schedules import NoiseSchedule

FORMAT = 1
PRETRAINED = Path(__file__).resolve().parent / "pretrained"
META, STATE, TRAINING = "fastdiff.json", "training_state.safetensors", "training.json"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

_STEP = re.compile(r"step-(\d+)")


@dataclass
class Checkpoint:
    """A trained model and what is needed to sample from it.

    Attributes:
        model: the network, float32, in eval mode.
        schedule: the noise schedule it was trained on.
        prediction: what it predicts: eps, x0, v or score.
        classes: names of the classes; empty for an unconditional model.
        step: training steps behind it.
        seed: seed of that training.
        dataset: name of the data set.
        null_class: the model has one class more, the last, that stands for none: it was trained
            with label dropout and can be guided (Ho & Salimans 2022, arXiv:2207.12598).
    """

    model: UNet2DModel
    schedule: NoiseSchedule
    prediction: str
    classes: tuple[str, ...] = ()
    step: int = 0
    seed: int = 0
    dataset: str = ""
    null_class: bool = False

    @property
    def image_size(self) -> int:
        """Height and width of the images; InputError unless the model's config has one number."""
        size = self.model.config.sample_size
        if not isinstance(size, int):
            raise InputError(f"the model's sample_size must be one number, got {size}")
        return size

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.model.config.in_channels

    def check_labels(self, labels: Sequence[int]) -> None:
        """InputError unless every label is a class of this model."""
        if labels and not self.classes:
            raise InputError("the model is unconditional: it has no classes to ask for")
        wrong = [label for label in labels if not 0 <= label < len(self.classes)]
        if wrong:
            raise InputError(
                f"class {wrong[0]} does not exist: the model has 0..{len(self.classes) - 1}"
            )

    def sample(
        self,
        sampler: Sampler,
        *,
        labels: Sequence[int] | None = None,
        count: int | None = None,
        guidance: float | Sequence[float] = 1.0,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
        progress: bool | str = True,
    ) -> Tensor:
        """Draw images in [-1, 1].

        Args:
            sampler: steps to take, made for this checkpoint's schedule and prediction.
            labels: class of each image; required for a model with classes, else None.
            count: how many images; None takes the number of labels.
            guidance: scale of classifier-free guidance, as in ``fastdiff.sample``.
            generator: source of all noise.
            batch_size: images in one pass; changes which noise an image gets on the way.
            progress: show a progress bar.

        Returns:
            [N, C, S, S] on the CPU.

        Raises:
            InputError: labels for a model without classes, none for one with, or unknown ones;
                guidance of a model that was trained without label dropout.
        """
        if self.classes and labels is None:
            raise InputError("the model is class-conditional: say which classes to draw")
        self.check_labels(labels or ())
        count = len(labels or ()) if count is None else count
        if count < 0 or batch_size < 1:
            raise InputError(f"cannot draw {count} images, {batch_size} at a time")
        if labels is not None and len(labels) != count:
            raise InputError(f"{count} images were asked for, with {len(labels)} labels")
        shape, device = (count, self.channels, self.image_size, self.image_size), self.model.device
        noise = torch.randn(shape, generator=generator)
        cond, uncond = {}, None
        if labels is not None:
            classes = torch.tensor(labels, dtype=torch.int64, device=device)
            cond["class_labels"] = classes
            if self.null_class:
                uncond = {"class_labels": torch.full_like(classes, len(self.classes))}
        if guidance != 1 and uncond is None:
            raise InputError(
                f"guidance {guidance} needs a model with classes, trained with label dropout"
            )
        images = sample(
            self.model,
            sampler,
            shape,
            x_T=noise.to(device, memory_format=torch.channels_last),
            cond=cond,
            uncond=uncond,
            guidance=guidance,
            generator=generator,
            max_batch=batch_size,
            progress=progress,
        )
        return images.contiguous().cpu()


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: the name of a model shipped with fastdiff ("digits"), a checkpoint folder, or the
            folder of a training run, whose newest checkpoint is taken. A shipped name wins over a
            folder of that name; write ./digits for the folder.

    Returns:
        The checkpoint on the CPU, its model in eval mode and float32 whatever the file holds.

    Raises:
        CheckpointError: nothing there, or files that are damaged, foreign or of another version;
            the text names the file.
    """
    folder = resolve(path)
    meta = _read_json(folder / META)
    _check_format(meta, folder / META)
    schedule = _read_schedule(meta, folder / META)
    prediction = _field(meta, "prediction", str, folder / META)
    if prediction not in process.KINDS:
        raise CheckpointError(f"{folder / META}: unknown prediction {prediction!r}")
    model = _read_model(folder)
    found = Checkpoint(
        model,
        schedule,
        prediction,
        classes=tuple(map(str, _field(meta, "classes", list, folder / META))),
        step=_field(meta, "step", int, folder / META),
        seed=_field(meta, "seed", int, folder / META),
        dataset=_field(meta, "dataset", str, folder / META),
        null_class=_field({"null_class": False, **meta}, "null_class", bool, folder / META),
    )
    for key, told, name in (
        ("image_size", _field(meta, "image_size", int, folder / META), "sample_size"),
        ("channels", _field(meta, "channels", int, folder / META), "in_channels"),
        ("classes", len(found.classes) + found.null_class or None, "num_class_embeds"),
    ):
        value = getattr(model.config, name)
        if told != value:
            raise CheckpointError(
                f"{folder}: {META} and {CONFIG} disagree: {key} is {told}, {name} is {value}"
            )
    return found


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that ``path`` names, as :func:`load` understands it."""
    if str(path) in shipped():
        return PRETRAINED / str(path)
    folder = Path(path)
    if (folder / META).is_file():
        return folder
    found = newest(folder)
    if found is not None:
        return found
    if not folder.exists():
        names = "".join(f", and no shipped model is called so ({n})" for n in shipped()[:1])
        raise CheckpointError(f"no checkpoint at {folder}: no such folder{names}")
    raise CheckpointError(f"{folder} is not a fastdiff checkpoint: it has no {META}")


def shipped() -> tuple[str, ...]:
    """Names of the models that come with fastdiff."""
    return tuple(sorted(meta.parent.name for meta in PRETRAINED.glob(f"*/{META}")))


def all_steps(out: str | Path) -> list[Path]:
    """Checkpoints of a training run, oldest first."""
    found = []
    for folder in Path(out).glob("checkpoints/step-*"):
        match = _STEP.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found)]


def newest(out: str | Path) -> Path | None:
    """The newest checkpoint of a training run, or None."""
    return next(reversed(all_steps(out)), None)


def step_folder(out: str | Path, step: int) -> Path:
    """Where a training run keeps its checkpoint of ``step``."""
    return Path(out) / "checkpoints" / f"step-{step:08d}"


def save(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    state: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None,
) -> None:
    """Write a checkpoint as a new folder: all of it, flushed to disk, or nothing.

    Args:
        checkpoint: what to write.
        folder: where; must not exist yet.
        dtype: of the model's weights in the file.
        state: tensors and JSON facts that resuming needs, see :func:`read_state`.

    Raises:
        CheckpointError: the folder exists, weights are not finite in ``dtype``, or the disk
            refused; whatever was there before is untouched.
    """
    folder = Path(folder)
    model = checkpoint.model
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"not written: {name} is not finite in {dtype}")
    with _new_folder(folder) as staging:
        model.save_pretrained(staging)
        _write_json(staging / META, _meta(checkpoint))
        if state is not None:
            tensors, facts = state
            contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
            save_file(contiguous, staging / STATE)
            _write_json(staging / TRAINING, {"format": FORMAT, **facts})


def export(checkpoint: Checkpoint, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint without its training state, to share: see :func:`save`."""
    save(checkpoint, folder, dtype=dtype)


def read_state(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts that :func:`save` was given as ``state``.

    Raises:
        CheckpointError: the checkpoint was exported without them, or they are damaged.
    """
    return _read_tensors(Path(folder) / STATE), read_facts(folder)


def read_facts(folder: str | Path) -> dict[str, Any]:
    """The JSON part of :func:`read_state`."""
    path = Path(folder) / TRAINING
    if not path.is_file():
        raise CheckpointError(f"{folder} cannot be resumed: it has no {TRAINING}")
    facts = _read_json(path)
    _check_format(facts, path)
    return facts


def prune(out: str | Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints of a run, and what unfinished writes left."""
    for folder in all_steps(out)[:-keep]:
        shutil.rmtree(folder)
    for folder in Path(out).glob("checkpoints/.step-*.partial"):
        shutil.rmtree(folder)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that becomes it when the block ends well, else disappears."""
    if target.exists():
        raise CheckpointError(f"{target} exists already; it was left as it is")
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a dead process that had this one's number
        staging.mkdir(parents=True)
        yield staging
        for file in staging.iterdir():
            _flush(file)
        _flush(staging)
        os.rename(staging, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"cannot write the checkpoint {target}: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _meta(checkpoint: Checkpoint) -> dict[str, Any]:
    schedule = checkpoint.schedule
    described: dict[str, Any] = {"name": schedule.name, "num_timesteps": schedule.num_timesteps}
    if _can_be_remade(schedule):
        described["options"] = schedule.options
    else:
        described["betas"] = schedule.betas.tolist()
    return {
        "format": FORMAT,
        "schedule": described,
        "prediction": checkpoint.prediction,
        "image_size": checkpoint.image_size,
        "channels": checkpoint.channels,
        "classes": list(checkpoint.classes),
        "null_class": checkpoint.null_class,
        "step": checkpoint.step,
        "seed": checkpoint.seed,
        "dataset": checkpoint.dataset,
    }


def _can_be_remade(schedule: NoiseSchedule) -> bool:
    if schedule.name not in schedules.NAMES:
        return False
    try:
        made = schedules.make(schedule.name, schedule.num_timesteps, **schedule.options)
    except (TypeError, ValueError):  # a caller's own betas under a well-known name
        return False
    return torch.equal(made.betas, schedule.betas)


def _read_schedule(meta: dict[str, Any], path: Path) -> NoiseSchedule:
    described = _field(meta, "schedule", dict, path)
    name = _field(described, "name", str, path)
    try:
        if "betas" in described:
            return NoiseSchedule(described["betas"], name=name)
        options = _field(described, "options", dict, path)
        count = _field(described, "num_timesteps", int, path)
        return schedules.make(name, count, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: unusable schedule: {error}") from None


def _read_model(folder: Path) -> UNet2DModel:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {name}")
    kind = _read_json(folder / CONFIG).get("_class_name")
    if kind != "UNet2DModel":
        raise CheckpointError(f"{folder / CONFIG} describes a {kind}, wanted a UNet2DModel")
    try:
        model = UNet2DModel.from_pretrained(folder).float().eval()
    except SafetensorError as error:
        raise _damaged(folder / WEIGHTS, error) from None
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise CheckpointError(f"cannot build the model of {folder}: {error}") from None
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{folder / WEIGHTS}: {name} has NaN or infinity")
    return model


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not complete: it has no {path.name}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(f"{path} is damaged or no safetensors file ({size} bytes): {error}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _check_format(value: dict[str, Any], path: Path) -> None:
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {value.get('format')!r}; this fastdiff reads format {FORMAT}"
        )


def _field(value: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    found = value.get(key)
    if not isinstance(found, kind):
        raise CheckpointError(f"{path}: {key!r} must be a {kind.__name__}, got {found!r}")
    return found
