"""Training images in memory: scikit-learn's digits, or a folder of image files."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.common.errors import DataError, require
from fastdiff.common.progress import progress_bar
from fastdiff.data import image_file
from fastdiff.data.file_names import as_text
from fastdiff.data.image_file import Depth
from fastdiff.data.image_folder import find
from fastdiff.data.image_grid import from_uint8

HELD_OUT = 5  # of each class every fifth image is held out
NAMED_FILES = 10  # number of unreadable files that a message names; it counts the others

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size with their classes.

    Attributes:
        images: [N, C, S, S], uint8 in 0..255 or float32 in [-1, 1] (a warning tells of others).
        labels: class of each image, int64 [N], or None.
        classes: names of the classes; empty without labels.
        name: of the data set, which checkpoints record.
        flip: in training, mirror a random half of the images left to right.

    Raises:
        DataError: images or labels of another shape or dtype, values that are not finite, labels
            outside the classes.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    name: str = ""
    flip: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or shape[0] == 0 or shape[2] != shape[3]:
            raise DataError(f"images must have shape [N, C, S, S] with N >= 1, got {shape}")
        if self.images.dtype not in (torch.uint8, torch.float32):
            raise DataError(f"images must be uint8 or float32, got {self.images.dtype}")
        if self.images.dtype == torch.float32:
            low, high = (float(edge) for edge in self.images.aminmax())  # NaN if there is one
            if not (math.isfinite(low) and math.isfinite(high)):
                raise DataError("float32 images must be finite, got NaN or infinity")
            if low < -1 or high > 1:
                warnings.warn(
                    f"fastdiff: float32 images should lie in [-1, 1], got {low:g} to {high:g}; "
                    "pass pixels of 0 to 255 as uint8, or scale them",
                    stacklevel=3,  # past the dataclass's __init__
                )
        if self.labels is None:
            if self.classes:
                raise DataError(f"classes {self.classes} are named, but there are no labels")
        elif (
            self.labels.shape != shape[:1]
            or self.labels.dtype != torch.int64
            or not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes)
        ):
            raise DataError(
                f"labels must be int64 of shape ({shape[0]},) in 0..{len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """C: 1 for grey images, 3 for colour images."""
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """S, height and width."""
        return self.images.shape[2]

    def without_labels(self) -> ImageSet:
        """The same images without labels, for unconditional training."""
        return ImageSet(self.images, name=self.name, flip=self.flip)

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at ``indices``, int64 [M], as a set of their own."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, images=self.images[indices], labels=labels)

    def split(self) -> tuple[ImageSet, ImageSet | None]:
        """Split into images to train on, and the held-out images: every fifth of each class.

        Returns:
            Both sets; None in place of the second if no class has five images.

        Raises:
            DataError: there are no labels.
        """
        if self.labels is None:
            raise DataError("images without labels cannot be split by class")
        held_out = _held_out(self.labels)
        if not bool(held_out.any()):
            return self, None
        train, rest = (
            ImageSet(self.images[chosen], self.labels[chosen], self.classes, self.name, self.flip)
            for chosen in (~held_out, held_out)
        )
        return train, rest

    def draw_mirrored(self, count: int, generator: torch.Generator | None) -> Tensor | None:
        """Which of ``count`` images are mirrored, bool [count]; None, drawing nothing, unless
        ``flip``."""
        if not self.flip:
            return None
        return torch.rand(count, generator=generator, device="cpu") < 0.5

    def read(self, indices: Tensor, mirrored: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Images float32 [B, C, S, S] in [-1, 1] and labels int64 [B] for ``indices``.

        Args:
            indices: numbers of the images, int64 [B].
            mirrored: which of them to mirror left to right, bool [B]; None for none.
        """
        x0 = self.images[indices]
        if x0.dtype == torch.uint8:
            x0 = from_uint8(x0)
        if mirrored is not None:
            x0 = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0)
        return x0, None if self.labels is None else self.labels[indices]

    def batch(
        self, indices: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What :meth:`read` gives for ``indices``, with a random half mirrored if ``flip``."""
        return self.read(indices, self.draw_mirrored(len(indices), generator))


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
    _check_size(size)
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
    _check_size(size)
    _check_range(value_range)
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder of images" if root.exists() else f"no {root}")
    groups = find(root)  # by class; "" for images without a class
    files = [(name, file) for name, group in groups.items() for file in group]
    channels = 1 if grayscale else 3
    pixels = np.empty((len(files), size, size, channels), dtype=np.uint8)
    counts = dict.fromkeys(groups, 0)
    done = 0
    bad: list[str] = []
    depths: list[tuple[Path, Depth]] = []
    for name, file in progress_bar(files, desc="reading images", shown=progress):
        try:
            image, depth = image_file.read(file, size, grayscale, value_range)
        except DataError as error:
            bad.append(str(error))
            continue
        pixels[done] = image
        done += 1
        counts[name] += 1
        if depth is not None:
            depths.append((file, depth))
    _check_read(root, bad, counts, skip_bad)
    if value_range is None:
        _warn_of_unused_bits(depths)
    elif not depths:
        raise DataError(
            f"value_range (--value-range) is for files of more than 8 bits a value; {root} has none"
        )
    classes = () if "" in groups else tuple(groups)
    each = torch.tensor(list(counts.values()), dtype=torch.int64, device="cpu")
    labels = torch.arange(len(classes), device="cpu").repeat_interleave(each) if classes else None
    images = torch.from_numpy(pixels[:done]).permute(0, 3, 1, 2).contiguous()
    names = tuple(map(as_text, classes))
    return ImageSet(images, labels, names, as_text(root.resolve().name), flip)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Indices of the images that step ``step`` trains on, int64 [batch_size].

    The steps consume, ``batch_size`` at a time, an endless stream of random permutations of
    0..count-1. The k-th permutation depends on (seed, k) alone, so a run that resumes needs no
    record of the order.
    """
    parts, position, wanted = [], step * batch_size, batch_size
    while wanted:
        epoch, offset = divmod(position, count)
        part = _permutation(count, epoch, seed)[offset : offset + wanted]
        parts.append(part)
        position, wanted = position + len(part), wanted - len(part)
    return torch.cat(parts)


def stream_generator(seed: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator seeded with :func:`stream_seed`."""
    return torch.Generator("cpu").manual_seed(stream_seed(seed, stream, index))


def stream_seed(seed: int, stream: str, index: int) -> int:
    """A 64-bit seed mixed from a run's seed, the name of a use of random numbers, and a position.

    With a stream for each use and the step as its position, every step has a source of random
    numbers that is independent of all others and the same when the run is resumed.
    """
    words = np.random.SeedSequence((seed, int.from_bytes(stream.encode(), "big"), index))
    return int(words.generate_state(1, np.uint64)[0])


def _held_out(labels: Tensor) -> Tensor:
    """Mask of the images that are every fifth of their class, bool [N]."""
    chosen = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in labels.unique().tolist():
        chosen[(labels == label).nonzero().flatten()[HELD_OUT - 1 :: HELD_OUT]] = True
    return chosen


@lru_cache(maxsize=2)
def _permutation(count: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=stream_generator(seed, "order", epoch), device="cpu")


def _check_size(size: int) -> None:
    if size < 1:
        raise DataError(f"the size of the images must be at least 1, got {size}")


def _check_range(value_range: tuple[float, float] | None) -> None:
    if value_range is None:
        return
    low, high = value_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise DataError(
            f"value_range must be two finite numbers, the lower first, got {low:g} and {high:g}"
        )


def _check_read(root: Path, bad: list[str], counts: dict[str, int], skip_bad: bool) -> None:
    """DataError for files that could not be read, or a line in the log with ``skip_bad``."""
    if not bad:
        return
    total = len(bad) + sum(counts.values())
    more = f"; and {len(bad) - NAMED_FILES} more" if len(bad) > NAMED_FILES else ""
    reasons = "; ".join(bad[:NAMED_FILES]) + more
    which = "the image" if len(bad) == 1 else f"{len(bad)} of {total} images:"
    if not skip_bad:
        raise DataError(
            f"cannot read {which} {reasons} (skip_bad=True, --skip-bad, skips such files)"
        )
    for name, count in counts.items():
        if not count:
            raise DataError(f"none of the images in {root / name} can be read: {reasons}")
    log.warning("left out %d of %d images that cannot be read: %s", len(bad), total, reasons)


def _warn_of_unused_bits(depths: Iterable[tuple[Path, Depth]]) -> None:
    """Warn of every kind of file in which no value reaches half of the assumed range.

    Files of one kind are judged together, since a single image may just be dark.
    """
    kinds: dict[tuple[str, int], list[tuple[Path, Depth]]] = {}
    for file, depth in depths:
        kinds.setdefault((depth.kind, depth.white), []).append((file, depth))
    for (kind, white), entries in kinds.items():
        file, brightest = max(entries, key=lambda entry: entry[1].largest)
        largest = int(brightest.largest)
        if 0 < largest <= white // 2:
            bits = max(8, largest.bit_length())
            warnings.warn(
                f"fastdiff: the largest value in the files of kind {kind} ({len(entries)} of them) "
                f"is {largest}, in {file}; read with {white} as white, their brightest pixel is "
                f"{largest * 256 // (white + 1)} of 255. If {2**bits - 1} is white, pass "
                f"value_range=(0, {2**bits - 1}) (--value-range 0 {2**bits - 1}); (0, {white}) "
                "keeps the images dark without this warning",
                stacklevel=3,
            )
