"""Fingerprints, by which a resumed run recognises its images: by their content, not their place.

The fingerprint of N images x_ip, in grey levels 0..255, is K sums

    s_k = sum_ip w_ki v_kp x_ip / sqrt(N D)

with random signs w_ki for each image and v_kp for each of its D values. The difference of two
fingerprints tells how far the images are apart: E (s_k - s'_k)^2 is the mean square of the
difference of all values (Achlioptas 2003, "Database-friendly random projections"). Unlike a hash,
a fingerprint still recognises images of which a few values are rounded differently, since another
processor has enlarged them or another version of a decoder has read them.

Of images that are read from files while a model trains, these are the sums of a sample: of up to
1024 of them, evenly spaced. With it go the labels of all images and a hash of the names of the
files.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.folder import field, optional_field
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import CheckpointError, DataError
from fastdiff.data.image_loading import SAMPLE, spaced
from fastdiff.data.order import stream_generator
from fastdiff.data.training_images import TrainingImages

SUMS = 16  # K
CHUNK = 2**20  # values that are summed at a time
# Root mean square differences of all values, in grey levels.
ROUNDING = 1e-3  # up to this the images count as the same
OTHER = 1.0  # up to this another decoder is the likely reason; beyond, the images are others


def fingerprint(images: TrainingImages, *, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fingerprint of images and their labels, as a JSON object; see the module's docstring.

    Args:
        images: all are read, or a sample if they say so (``images.sampled``).
        like: a fingerprint to compare with; it decides in place of the images whether all are read.

    Returns:
        ``sums``, K numbers, and ``labels``, a hash of the labels or None. Of a sample also
        ``sample``, the number of images that were read, and ``names``, a hash of the names of the
        files or None.
    """
    sampled = images.sampled if like is None else like.get("sample") is not None
    chosen = spaced(len(images), SAMPLE if sampled else len(images))
    count, values = len(chosen), math.prod(images.shape)
    of_image, of_value = _signs("images", count), _signs("values", values)
    sums = torch.zeros(SUMS, dtype=torch.float64, device="cpu")
    size = max(1, CHUNK // values)
    for indices, signs in zip(chosen.split(size), of_image.split(size), strict=True):
        levels = (images.read(indices)[0].flatten(1).double() + 1) * 127.5
        sums += (levels @ of_value * signs).sum(0)
    labels = images.labels
    data = b"" if labels is None else labels.cpu().numpy().tobytes()
    found: dict[str, Any] = {
        "sums": (sums / math.sqrt(count * values)).tolist(),
        "labels": None if labels is None else hashlib.blake2b(data, digest_size=16).hexdigest(),
    }
    return {**found, "sample": count, "names": images.listing} if sampled else found


def of_resumed(
    data: TrainingImages, saved: Checkpoint, facts: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The fingerprint of the images to go on with.

    Args:
        data: the images.
        saved: the checkpoint.
        facts: of its training state.
        path: the file of ``facts``.

    Raises:
        DataError: they are not the images of the run.
        CheckpointError: the recorded fingerprint is damaged.
    """
    if (facts.get("images"), saved.classes) != (len(data), data.classes):
        raise DataError(
            f"the run trained on {facts.get('images')} images of the classes "
            f"{saved.classes}, now there are {len(data)} of {data.classes}"
        )
    recorded = optional_field(facts, "fingerprint", dict, path)
    present = fingerprint(data, like=recorded)
    check_same(recorded, present, (saved.dataset, data.name), path)
    return present


def check_same(
    recorded: Mapping[str, Any] | None,
    present: Mapping[str, Any],
    names: tuple[str, str],
    path: Path,
) -> None:
    """Compare the fingerprint in a checkpoint with that of the images to go on with.

    A difference that another decoder explains is a warning.

    Args:
        recorded: the checkpoint's fingerprint; None if its version recorded none, which is a
            warning.
        present: the fingerprint of the images; their number and size must be the checkpoint's.
        names: the checkpoint's name of its data set, and the name of the images.
        path: the file that holds ``recorded``.

    Raises:
        DataError: the images or their labels differ.
        CheckpointError: the recorded fingerprint is damaged.
    """
    before, now = names
    if recorded is None:
        warnings.warn(
            f"fastdiff: {path} has no fingerprint of the images, so only their number and their "
            "classes were compared with those of the run",
            stacklevel=3,
        )
        return
    sums = field(recorded, "sums", list, path)
    if len(sums) != SUMS or not all(isinstance(value, float) for value in sums):
        raise CheckpointError(f"{path}: unusable fingerprint of the images: {sums!r}")
    gaps = (a - b for a, b in zip(sums, present["sums"], strict=True))
    apart = math.sqrt(sum(gap * gap for gap in gaps) / SUMS)
    if not apart <= OTHER:
        raise DataError(
            f"the run trained on other images: those of {before!r} then and of {now!r} now differ "
            f"by {apart:.1f} of 255 grey levels (root mean square)"
        )
    if optional_field(recorded, "labels", str, path) != present["labels"]:
        raise DataError(
            f"the run trained with other labels: those of {before!r} then and of {now!r} now differ"
        )
    files = {recorded.get("names"), present.get("names")}
    if None not in files and len(files) > 1:
        warnings.warn(
            f"fastdiff: the files of {now!r} have other names than those of {before!r}; of their "
            f"images {present['sample']} were compared, and are the same",
            stacklevel=3,
        )
    if apart > ROUNDING:
        warnings.warn(
            f"fastdiff: the images of {now!r} are not exactly those of {before!r} that the run "
            f"began with: they differ by {apart:.2g} of 255 grey levels (root mean square). The "
            "run goes on, but not exactly as with the first images",
            stacklevel=3,
        )


def _signs(stream: str, count: int) -> Tensor:
    """Random signs, float64 [count, SUMS]; the same at every call."""
    generator = stream_generator(0, f"fingerprint of {stream}", 0)
    return (
        torch.randint(2, (count, SUMS), generator=generator, device="cpu").mul_(2).sub_(1).double()
    )
