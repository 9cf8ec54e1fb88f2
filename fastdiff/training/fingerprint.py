"""What images are known by when a run goes on: their content, not the place they are read from.

The fingerprint of images x_ip, in grey levels 0..255, is K sums

    s_k = sum_ip w_ki v_kp x_ip / sqrt(N D)

with random signs w_ki for each image and v_kp for each of its D values. The difference of two
fingerprints tells how far the images are apart: E (s_k - s'_k)^2 is the mean square of the
difference of all values (Achlioptas 2003, "Database-friendly random projections"). Unlike a hash
it therefore knows images again that another processor has enlarged, or another version of a
decoder has read, with a value rounded differently here and there.
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
from fastdiff.common.errors import CheckpointError, DataError
from fastdiff.data.datasets import ImageSet, stream_generator

SUMS = 16
CHUNK = 2**20  # values at a time
ROUNDING = 1e-3  # grey levels, root mean square: as far apart as the same images may be
OTHER = 1.0  # grey levels, root mean square: farther apart than decoders are


def fingerprint(images: ImageSet) -> dict[str, Any]:
    """What to know images and labels by, as JSON has it: see the module.

    Returns:
        sums: K numbers.
        labels: a hash of the labels, or None.
    """
    count, values = len(images), images.images[0].numel()
    of_image, of_value = _signs("images", count), _signs("values", values)
    sums = torch.zeros(SUMS, dtype=torch.float64, device="cpu")
    size = max(1, CHUNK // values)
    for some, signs in zip(images.images.split(size), of_image.split(size), strict=True):
        levels = some.cpu().flatten(1).double()
        if images.images.dtype != torch.uint8:
            levels = (levels + 1) * 127.5
        sums += (levels @ of_value * signs).sum(0)
    labels = images.labels
    data = b"" if labels is None else labels.cpu().numpy().tobytes()
    return {
        "sums": (sums / math.sqrt(count * values)).tolist(),
        "labels": None if labels is None else hashlib.blake2b(data, digest_size=16).hexdigest(),
    }


def check_same(
    recorded: Mapping[str, Any] | None, found: Mapping[str, Any], names: tuple[str, str], path: Path
) -> None:
    """Make sure that images are those of a checkpoint, as far as their fingerprints tell.

    Args:
        recorded: the checkpoint's fingerprint; None, with a warning, of an older version.
        found: that of the images, as many and as large.
        names: of the checkpoint's data set and of the images.
        path: the file that ``recorded`` is from.

    Raises:
        DataError: other images, or other labels.
        CheckpointError: a fingerprint that is damaged.
    """
    was, now = names
    if recorded is None:
        warnings.warn(
            f"fastdiff: {path} does not say what the images looked like, so only their number and "
            "their classes were compared with those of the run",
            stacklevel=3,
        )
        return
    sums = field(recorded, "sums", list, path)
    if len(sums) != SUMS or not all(isinstance(value, float) for value in sums):
        raise CheckpointError(f"{path}: unusable fingerprint of the images: {sums!r}")
    gaps = (a - b for a, b in zip(sums, found["sums"], strict=True))
    apart = math.sqrt(sum(gap * gap for gap in gaps) / SUMS)
    if not apart <= OTHER:
        raise DataError(
            f"the run trained on other images: those of {was!r} then and of {now!r} now differ by "
            f"{apart:.1f} of 255 grey levels (root mean square)"
        )
    if optional_field(recorded, "labels", str, path) != found["labels"]:
        raise DataError(
            f"the run trained on the images of {was!r} with other labels than those of {now!r} have"
        )
    if apart > ROUNDING:
        warnings.warn(
            f"fastdiff: the images of {now!r} are not quite those of {was!r} that the run began "
            f"with: they differ by {apart:.2g} of 255 grey levels (root mean square). The run goes "
            "on, but not exactly as it would have gone on with those",
            stacklevel=3,
        )


def _signs(stream: str, count: int) -> Tensor:
    """Random signs, float64 [count, SUMS], always the same."""
    generator = stream_generator(0, f"fingerprint of {stream}", 0)
    return (
        torch.randint(2, (count, SUMS), generator=generator, device="cpu").mul_(2).sub_(1).double()
    )
