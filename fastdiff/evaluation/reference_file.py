"""References in files of arrays (.npz): features of our own, published batches and statistics."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.common.errors import DataError, InputError
from fastdiff.data.image_grid import check_writable
from fastdiff.data.image_set import ImageSet
from fastdiff.data.training_images import TrainingImages
from fastdiff.evaluation.distances import Gaussian
from fastdiff.evaluation.pictures import Pictures


@dataclass(frozen=True, eq=False)
class RealImages:
    """What is known of real images; each part is None where it is not.

    Attributes:
        images: the images themselves.
        pictures: their features and small copies.
        gaussian: mean and covariance of the features.
        description: the feature space of ``pictures``.
        labels: class of each image, int64 [N].
        classes: names of the classes.
    """

    images: TrainingImages | None = None
    pictures: Pictures | None = None
    gaussian: Gaussian | None = None
    description: str | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()


def save_reference(
    path: Path,
    pictures: Pictures,
    description: str,
    labels: Tensor | None = None,
    classes: tuple[str, ...] = (),
) -> None:
    """Write a reference with its features; programs that want ``mu`` and ``sigma`` read it too.

    After an error ``path`` is as it was before.

    Args:
        path: a file whose name ends in .npz.
        pictures: with features.
        description: of the feature space.
        labels: class of each image, int64 [N], or None.
        classes: names of the classes.

    Raises:
        InputError: the file cannot be written.
    """
    check_reference_path(path)
    assert pictures.features is not None
    gaussian = Gaussian.of(pictures.features)
    arrays = {
        "mu": gaussian.mean,
        "sigma": gaussian.cov,
        "features": pictures.features,
        "thumbnails": pictures.thumbnails.numpy(),
        "description": np.array(description),
    }
    if labels is not None:
        arrays |= {"labels": labels.numpy(), "classes": np.array(classes)}
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def check_reference_path(path: Path) -> None:
    """InputError unless a reference can be written at ``path``."""
    if path.suffix != ".npz":
        raise InputError(f"the name of a file of features must end in .npz, got {path}")
    check_writable(path)


def load_reference(path: Path) -> RealImages:
    """Read a file of :func:`save_reference`, a batch of images, or statistics.

    A batch is an array ``arr_0``, uint8 [N, S, S, 3], as guided-diffusion publishes its references.
    Statistics are ``mu`` [D] and ``sigma`` [D, D], as pytorch-fid writes them. No pickled object is
    read.

    Raises:
        DataError: the file is missing, damaged, or has none of these.
    """
    wanted = (
        "arr_0", "mu", "sigma", "features", "thumbnails", "description", "labels", "classes",
    )  # fmt: skip
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("it is one array without a name")
        with opened:
            found = {name: opened[name] for name in wanted if name in opened}
            others = ", ".join(opened.files)
    except FileNotFoundError:
        raise DataError(f"no {path}") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive can make its decoder raise anything
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as a file of arrays (.npz): {reason}") from None
    if "features" in found and "thumbnails" in found and "description" in found:
        return _own(path, found)
    images = _images(path, found) if "arr_0" in found else None
    gaussian = _gaussian(path, found) if "mu" in found and "sigma" in found else None
    if images is None and gaussian is None:
        raise DataError(
            f"{path} must have the arrays arr_0 (images), mu and sigma, or those that "
            f"--save-features writes, got {others or 'none'}"
        )
    return RealImages(images, gaussian=gaussian)


def _images(path: Path, found: dict[str, np.ndarray]) -> ImageSet:
    images = found["arr_0"]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8:
        raise DataError(
            f"{path}: arr_0 must be images uint8 [N, S, S, 3], got {images.dtype} {images.shape}"
        )
    try:
        return ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _gaussian(path: Path, found: dict[str, np.ndarray]) -> Gaussian:
    mean, cov = found["mu"], found["sigma"]
    if mean.ndim != 1 or cov.shape != mean.shape * 2 or mean.dtype.kind + cov.dtype.kind != "ff":
        raise DataError(
            f"{path}: mu must be floating point [D] and sigma [D, D], got {mean.dtype} "
            f"{mean.shape} and {cov.dtype} {cov.shape}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise DataError(f"{path}: mu and sigma must be finite")
    return Gaussian.of_moments(mean, cov)


def _own(path: Path, found: dict[str, np.ndarray]) -> RealImages:
    features, small = found["features"], found["thumbnails"]
    labels = torch.from_numpy(found["labels"]) if "labels" in found else None
    classes = tuple(map(str, found["classes"])) if "classes" in found else ()
    good = features.ndim == 2 and features.dtype.kind == "f"
    good &= small.ndim == 4 and small.dtype == np.uint8 and len(small) == len(features)
    if labels is not None:
        good &= labels.shape == (len(features),) and labels.dtype == torch.int64
        good = good and 0 <= int(labels.min()) <= int(labels.max()) < len(classes)
    if not good or not np.isfinite(features).all():
        raise DataError(f"{path}: its features, small copies and labels do not belong together")
    return RealImages(
        pictures=Pictures(torch.from_numpy(small), features),
        description=str(found["description"]),
        labels=labels,
        classes=classes,
    )
