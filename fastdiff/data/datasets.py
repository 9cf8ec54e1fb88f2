"""Images to train on by name: scikit-learn's digits, a folder of image files, and all formats."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

from fastdiff.common.errors import DataError, require
from fastdiff.data.image_file import Reading
from fastdiff.data.image_folder import ImageFolder
from fastdiff.data.image_loading import load, read_all
from fastdiff.data.image_set import ImageSet
from fastdiff.data.order import batch_indices, stream_generator, stream_seed
from fastdiff.data.recognition import find_source
from fastdiff.data.training_images import TrainingImages

__all__ = [
    "ImageSet", "batch_indices", "digits", "folder", "open_images", "stream_generator",
    "stream_seed",
]  # fmt: skip

CACHE = 2 * 2**30  # bytes of images in memory


def digits(split: str = "train", size: int = 16) -> ImageSet:
    """Handwritten digits: scikit-learn's copy of the UCI set, 1797 images of 8x8, values 0..16.

    Every fifth digit of each class, in the set's order, is held out.

    Args:
        split: train or test (the held-out fifth).
        size: height and width; the 8x8 originals are enlarged bicubically.

    Raises:
        DataError: an unknown split, or a size below 1.
        InputError: scikit-learn is not installed.
    """
    if size < 1:
        raise DataError(f"the size of the images must be at least 1, got {size}")
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r}, wanted train or test")
    bunch = require("sklearn.datasets").load_digits()
    labels = torch.from_numpy(bunch.target).long()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    if size != images.shape[-1]:
        images = functional.interpolate(images, (size, size), mode="bicubic").clamp(-1, 1)
    train, test = ImageSet(images, labels, tuple("0123456789"), "digits").split()
    assert test is not None
    return test if split == "test" else train


def folder(
    path: str | Path,
    size: int,
    *,
    grayscale: bool = False,
    flip: bool = False,
    value_range: tuple[float, float] | None = None,
    skip_bad: bool = False,
    progress: bool = True,
) -> ImageSet:
    """Read every image of a folder: its largest centred square, resized to ``size``.

    Images in sub-folders belong to classes named after the sub-folders; class ids follow the
    sorted names. Files and folders whose names begin with a dot are skipped. Only the first frame
    or page of a file is read. Images are turned upright by their EXIF data; transparency becomes
    white.

    Args:
        path: the folder.
        size: height and width of the result.
        grayscale: read one channel instead of three.
        flip: in training, mirror a random half of the images left to right.
        value_range: the values of black and white in files with more than 8 bits a value. Examples:
            (0, 4095) for 12-bit camera images in files of 16 bits, (0, 1) for floating-point
            images. Values outside are clipped. None takes the whole range of the integers that the
            file stores, 0..65535 for 16 bits, and warns if that looks too wide: if no value in any
            such file of the folder reaches half of it. Files of 8 bits are read as they are.
        skip_bad: skip files that cannot be read, and log how many.
        progress: show a progress bar on standard error.

    Raises:
        DataError: the folder does not exist or cannot be listed, there are no images, there are
            images both beside and in sub-folders, a sub-folder has no images, the size is below 1,
            or ``value_range`` is invalid or no file has more than 8 bits. Files that cannot be
            read, which the text names with the reasons: damaged files, files that are no image,
            links to nothing, and files of unknown range (floating-point values, or integers outside
            0..65535, without ``value_range``). With ``skip_bad`` unreadable files are an error only
            if no image of the folder, or of a class, is left.
    """
    reading = Reading(size, grayscale, value_range)
    source = ImageFolder(Path(path), progress=progress)
    return read_all(source, reading, flip=flip, skip_bad=skip_bad, progress=progress)


def open_images(
    data: str | Path,
    size: int,
    *,
    split: str = "train",
    grayscale: bool = False,
    flip: bool = False,
    value_range: tuple[float, float] | None = None,
    crop: str = "center",
    resize: str = "bicubic",
    latent_scale: float = 1.0,
    image_column: str | None = None,
    label_column: str | None = None,
    cache: int = CACHE,
    workers: int = 0,
    skip_bad: bool = False,
    progress: bool = True,
) -> TrainingImages:
    """The images of any format, in memory if they fit, else read while a model trains.

    Args:
        data: see :func:`fastdiff.data.recognition.find_source`.
        size: height and width of the images; of latents, their own.
        split: train, test, or as the data set names its splits; folders have none.
        grayscale: read one channel instead of three.
        flip: in training, mirror a random half of the images left to right.
        value_range: see :func:`folder`.
        crop: "center" for the largest centred square of each image, "random" for a square of its
            shorter side at a place that is drawn anew each time.
        resize: the filter: bicubic, box or lanczos.
        latent_scale: multiplies latents.
        image_column: of a table, the column of the images.
        label_column: of a table, the column of the labels.
        cache: bytes of memory for images, without those of the next few batches.
        workers: number of processes that read; 0 reads in the calling thread.
        skip_bad: do without images that cannot be read, see
            :func:`fastdiff.data.image_loading.load`.
        progress: show progress on standard error.

    Raises:
        DataError: there are no images, they cannot be read, or the options do not suit them.
        InputError: a package is missing; the text says which.
    """
    source = find_source(
        str(data), split=split, image_column=image_column, label_column=label_column,
        progress=progress,
    )  # fmt: skip
    return load(
        source, Reading(size, grayscale, value_range, crop, resize), cache=cache, workers=workers,
        flip=flip, skip_bad=skip_bad, scale=latent_scale, progress=progress,
    )  # fmt: skip
