"""Pairs of noise and the image that a teacher makes of it, for reflow.

The probability-flow ODE joins each noise with one image. A network that is trained on such pairs,
rather than on independent ones, learns lines that cross less, which fewer steps follow (Liu et al.
2022, arXiv:2209.03003, section 2.2). Only the images are kept: the noise of image i is that of
``ops.philox_normal`` for the pairs' seed and the number i, which the loss makes again.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastdiff import ops
from fastdiff.checkpoints.folder import read_tensors
from fastdiff.common.errors import DataError
from fastdiff.common.inputs import checked_seeds
from fastdiff.common.world import World
from fastdiff.data.image_set import ImageSet
from fastdiff.training.distillation import Teacher

METHOD = "unipc-2"  # the solver of the teacher's ODE
NAME = "pairs.safetensors"  # of the file in a run's folder


def make(
    teacher: Teacher,
    count: int,
    *,
    seed: int = 0,
    steps: int = 50,
    world: World | None = None,
    progress: bool | str = "pairs",
) -> ImageSet:
    """The images of ``count`` pairs, their classes in turn.

    Args:
        teacher: whose ODE is solved, guided by its scale.
        count: number of pairs.
        seed: of their noise.
        steps: of the solver.
        world: processes that share the work; None for this one alone.
        progress: show a progress bar, under this name if it is one.
    """
    trained = teacher.trained
    labels = [i % len(trained.classes) for i in range(count)] if trained.classes else None
    shape = (count, trained.channels, trained.image_size, trained.image_size)
    images = trained.sample(
        trained.diffusion().sampler(METHOD, steps),
        labels=labels,
        count=count,
        guidance=teacher.guidance,
        noise=ops.philox_normal(checked_seeds(seed, None, count), 0, shape),
        progress=progress,
        world=world,
    )
    return _image_set(images, labels, trained.classes, trained.dataset)


def write(images: ImageSet, path: Path, made: Mapping[str, Any]) -> None:
    """Write the images of pairs as a safetensors file, which is whole or not there.

    Args:
        images: from :func:`make`.
        path: of the file.
        made: JSON values that say how they were made, for :func:`read` to compare.

    Raises:
        OSError: it could not be written.
    """
    tensors = {"images": images.images.contiguous()}
    if images.labels is not None:
        tensors["labels"] = images.labels
    partial = path.with_suffix(".partial")
    facts = {
        "classes": json.dumps(images.classes), "name": images.name, "made": json.dumps(made)
    }  # fmt: skip
    save_file(tensors, partial, metadata=facts)
    os.replace(partial, path)


def read(path: Path, made: Mapping[str, Any] | None = None) -> ImageSet:
    """The images of pairs that :func:`write` wrote.

    Args:
        path: of the file.
        made: how they must have been made; None for whatever way.

    Raises:
        DamagedError: the file is missing or damaged.
        DataError: it is no file of pairs, or they were made in another way.
    """
    tensors = read_tensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
        was = json.loads(facts["made"])
        labels = tensors["labels"].tolist() if "labels" in tensors else None
        classes = tuple(json.loads(facts["classes"]))
        images = _image_set(tensors["images"], labels, classes, facts["name"])
    except (KeyError, ValueError, SafetensorError) as error:
        raise DataError(f"{path} is no file of pairs: {error}") from None
    if made is not None and was != made:
        raise DataError(f"{path} has pairs of {was}, wanted {dict(made)}; delete it to make them")
    return images


def _image_set(
    images: torch.Tensor, labels: list[int] | None, classes: tuple[str, ...], name: str
) -> ImageSet:
    with warnings.catch_warnings():  # what an ODE ends in is a little outside of [-1, 1]
        warnings.filterwarnings("ignore", "fastdiff: float32 images should lie in")
        known = None if labels is None else torch.tensor(labels, device="cpu")
        return ImageSet(images, known, classes, name)
