"""Checkpoints of classifiers of noised images, which guide a diffusion model (arXiv:2105.05233).

Each is a folder, written completely or not at all and never pickled:

    classifier.json            process, architecture, classes, origin, accuracy on held-out images
    classifier.safetensors     the averaged weights
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints import forward_process
from fastdiff.checkpoints.checkpoint import META as CHECKPOINT_META
from fastdiff.checkpoints.folder import (
    FORMAT,
    check_format,
    field,
    new_folder,
    not_finite,
    read_json,
    read_tensors,
    write_json,
)
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import CheckpointError, InputError
from fastdiff.common.tensor_file import save_file
from fastdiff.nn import NoisyClassifier
from fastdiff.nn.image_unet import make_unet
from fastdiff.nn.pretrained import NoInitialisation, check_names_and_shapes
from fastdiff.nn.wrappers import plain_names, plain_state
from fastdiff.objectives import Forward

META, WEIGHTS = "classifier.json", "classifier.safetensors"


@dataclass(frozen=True)
class Architecture:
    """Architecture of a classifier, see :func:`fastdiff.nn.image_unet.make_unet`.

    Attributes:
        image_size: height and width of the images.
        channels: of the images.
        widths: feature channels of each level; each level has half the resolution of the one
            before.
        layers_per_block: residual blocks in each level.
        attention: the levels with self-attention; level 0 has the full resolution.
    """

    image_size: int
    channels: int = 1
    widths: tuple[int, ...] = (32, 64, 64)
    layers_per_block: int = 2
    attention: tuple[int, ...] = (1, 2)

    def make(self, num_classes: int) -> NoisyClassifier:
        """A new classifier, its weights initialised from torch's global generator.

        Raises:
            InputError: sizes that do not fit together, or fewer than 2 classes.
        """
        if num_classes < 2:
            raise InputError(f"a classifier needs 2 classes or more, got {num_classes}")
        with torch.device("meta"), NoInitialisation():  # for its configuration alone
            unet = make_unet(
                self.image_size, self.channels, widths=self.widths,
                layers_per_block=self.layers_per_block, attention=self.attention,
            )  # fmt: skip
        return NoisyClassifier(num_classes, **unet.config.to_dict())


@dataclass(frozen=True)
class Accuracy:
    """Share of the held-out images that are classified correctly at one noise level.

    Attributes:
        alpha: coefficient of the image.
        sigma: coefficient of the noise.
        share: of the images, in 0..1.
    """

    alpha: float
    sigma: float
    share: float


@dataclass
class Classifier:
    """A trained classifier, callable as (x, t) -> logits [N, K].

    It can be the ``classifier`` of ``Checkpoint.sample``. t is the time as the diffusion network is
    given it: the timestep of a schedule, or ``sde.label(t)`` of an SDE.

    Attributes:
        model: the network, float32, in eval mode; it may be compiled.
        forward: the process that the classifier was trained on.
        architecture: of the network.
        classes: names of the classes.
        step: number of training steps that the classifier has had.
        seed: of the training.
        dataset: name of the data set.
        accuracy: on held-out images, from the highest noise level to the lowest; empty without
            held-out images.
    """

    model: NoisyClassifier
    forward: Forward
    architecture: Architecture
    classes: tuple[str, ...]
    step: int = 0
    seed: int = 0
    dataset: str = ""
    accuracy: tuple[Accuracy, ...] = ()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits [N, K] of images x [N, C, S, S]."""
        return self.model(x, t)


def save(classifier: Classifier, folder: str | Path) -> None:
    """Write a classifier as a new folder, flushed to disk; after an error there is no folder.

    Raises:
        CheckpointError: the folder exists, weights are not finite, or the file system refused the
            write.
    """
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in plain_state(classifier.model).items()
    }
    if name := not_finite(tensors):
        raise CheckpointError(f"not written: {name} is not finite")
    facts = {
        "format": FORMAT,
        **forward_process.describe(classifier.forward),
        "architecture": asdict(classifier.architecture),
        "classes": list(classifier.classes),
        "step": classifier.step,
        "seed": classifier.seed,
        "dataset": classifier.dataset,
        "accuracy": [asdict(level) for level in classifier.accuracy],
    }
    with new_folder(Path(folder)) as staging:
        write_json(staging / META, facts)
        save_file(tensors, staging / WEIGHTS)


def load(folder: str | Path) -> Classifier:
    """Read a classifier, on the CPU and in eval mode.

    Raises:
        CheckpointError: there is no classifier, or its files are damaged, of another program or of
            another format; the text names the file.
    """
    path = Path(folder) / META
    if not path.is_file():
        reason = "it has no " + META if Path(folder).is_dir() else "no such folder"
        if (Path(folder) / CHECKPOINT_META).is_file():
            reason += ", but is a checkpoint of a diffusion model"
        raise CheckpointError(f"no classifier at {folder}: {reason}")
    meta = read_json(path)
    check_format(meta, path)
    classes = tuple(map(str, field(meta, "classes", list, path)))
    try:
        shape: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in field(meta, "architecture", dict, path).items()
        }
        architecture = Architecture(**shape)
        accuracy = tuple(Accuracy(**level) for level in field(meta, "accuracy", list, path))
        model = architecture.make(len(classes))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: unusable classifier: {error}") from None
    tensors = plain_names(read_tensors(path.with_name(WEIGHTS)))
    try:
        check_names_and_shapes(tensors, model.state_dict())
    except ValueError as error:
        raise CheckpointError(f"{path.with_name(WEIGHTS)}: {error}") from None
    if wrong := not_finite(tensors):
        raise CheckpointError(f"{path.with_name(WEIGHTS)}: {wrong} has NaN or infinity")
    model.load_state_dict(tensors)
    return Classifier(
        model.eval().requires_grad_(False),
        forward_process.read(meta, path),
        architecture,
        classes,
        step=field(meta, "step", int, path),
        seed=field(meta, "seed", int, path),
        dataset=field(meta, "dataset", str, path),
        accuracy=accuracy,
    )


def check_fits(classifier: Classifier, checkpoint: Checkpoint) -> None:
    """InputError unless a classifier can guide a checkpoint's model.

    Both must have the same forward process, image size, channels and classes. If the checkpoint has
    no classes, the classifier may have any.
    """
    shape = classifier.architecture
    pairs: list[tuple[str, Any, Any]] = [
        ("images of size", shape.image_size, checkpoint.image_size),
        ("images of channels", shape.channels, checkpoint.channels),
    ]
    if checkpoint.classes:
        pairs.append(("the classes", classifier.classes, checkpoint.classes))
    for property_name, own, wanted in pairs:
        if own != wanted:
            raise InputError(f"the classifier knows {property_name} {own}, the model has {wanted}")
    if forward_process.describe(classifier.forward) != forward_process.describe(checkpoint.forward):
        raise InputError(
            f"the classifier was trained on {classifier.forward!r}, the model on "
            f"{checkpoint.forward!r}"
        )
