"""Training images, held in memory: scikit-learn's digits, or a folder of image files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from fastdiff.errors import DataError, require
from fastdiff.images import from_uint8

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
HELD_OUT = 5  # every fifth image of each class


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size with their classes.

    Attributes:
        images: [N, C, S, S], uint8 in 0..255 or float32 in [-1, 1].
        labels: class of each image, int64 [N], or None.
        classes: names of the classes; empty without labels.
        name: what checkpoints record as their data set.
        flip: mirror a random half of the images left to right when training.
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
        """C: 1 for grey images, 3 for colour."""
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """S, height and width."""
        return self.images.shape[2]

    def without_labels(self) -> ImageSet:
        """The same images for unconditional training."""
        return ImageSet(self.images, name=self.name, flip=self.flip)

    def split(self) -> tuple[ImageSet, ImageSet | None]:
        """Images to train on, and every fifth of each class; None if no class has five.

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

    def batch(
        self, indices: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Images float32 [B, C, S, S] in [-1, 1] and labels int64 [B] for ``indices``."""
        x0 = self.images[indices]
        if x0.dtype == torch.uint8:
            x0 = from_uint8(x0)
        if self.flip:
            mirrored = torch.rand(len(x0), generator=generator) < 0.5
            x0 = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0)
        return x0, None if self.labels is None else self.labels[indices]


def digits(split: str = "train", size: int = 16) -> ImageSet:
    """Handwritten digits of the UCI set that scikit-learn carries: 1797 of 8x8 with values 0..16.

    Every fifth digit of each class, in the set's order, is held out.

    Args:
        split: train or test (the held-out fifth).
        size: height and width; the 8x8 originals are enlarged bicubically.

    Raises:
        DataError: another split, or no size.
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
    progress: bool = True,
) -> ImageSet:
    """Read every image of a folder: its largest centred square, resized to ``size``.

    Images in sub-folders belong to classes named after the sub-folders; class ids follow the
    sorted names. Files and folders whose names begin with a dot are passed over.

    Args:
        path: the folder.
        size: height and width of the images.
        grayscale: one channel in place of three.
        flip: mirror a random half of the images left to right when training.
        progress: show a progress bar on standard error.

    Raises:
        DataError: no such folder, no images, images both beside and in sub-folders, a sub-folder
            without images, a file that cannot be read (named in the text), or no size.
    """
    _check_size(size)
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder of images" if root.exists() else f"no {root}")
    direct = [entry for entry in _visible(root) if _is_image(entry)]
    below = {entry.name: list(_images(entry)) for entry in _visible(root) if entry.is_dir()}
    if direct and any(below.values()):
        raise DataError(
            f"{root} has images both in itself and in sub-folders; "
            "put every image into a sub-folder named after its class, or none"
        )
    files = direct or [file for group in below.values() for file in group]
    if not files:
        raise DataError(f"{root} has no images (looked for {', '.join(sorted(SUFFIXES))})")
    classes = () if direct else tuple(below)
    for name in classes:
        if not below[name]:
            raise DataError(f"the class folder {root / name} has no images")
    channels = 1 if grayscale else 3
    pixels = np.empty((len(files), size, size, channels), dtype=np.uint8)
    for i, file in enumerate(tqdm(files, desc="reading images", disable=not progress)):
        pixels[i] = _read(file, size, grayscale)
    counts = torch.tensor([len(below[name]) for name in classes], dtype=torch.int64)
    labels = torch.arange(len(classes)).repeat_interleave(counts) if classes else None
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, labels, classes, root.resolve().name, flip)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which images step ``step`` trains on, int64 [batch_size].

    They are the next ``batch_size`` of an endless stream of permutations of 0..count-1, each drawn
    from (seed, its number) alone. So a run that resumes needs no record of the order.
    """
    parts, position, wanted = [], step * batch_size, batch_size
    while wanted:
        epoch, offset = divmod(position, count)
        part = _permutation(count, epoch, seed)[offset : offset + wanted]
        parts.append(part)
        position, wanted = position + len(part), wanted - len(part)
    return torch.cat(parts)


def stream_generator(seed: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator that depends on these three alone: one source of noise a step."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, index))


def stream_seed(seed: int, stream: str, index: int) -> int:
    """A 64-bit seed well mixed from a run's seed, the name of a use, and a position."""
    words = np.random.SeedSequence((seed, int.from_bytes(stream.encode(), "big"), index))
    return int(words.generate_state(1, np.uint64)[0])


def _held_out(labels: Tensor) -> Tensor:
    """Which images are every fifth of their class, bool [N]."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        chosen[(labels == label).nonzero().flatten()[HELD_OUT - 1 :: HELD_OUT]] = True
    return chosen


@lru_cache(maxsize=2)
def _permutation(count: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=stream_generator(seed, "order", epoch))


def _check_size(size: int) -> None:
    if size < 1:
        raise DataError(f"the size of the images must be at least 1, got {size}")


def _visible(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _images(root: Path) -> Iterator[Path]:
    """Image files in ``root`` and below, in sorted order."""
    for entry in _visible(root):
        if entry.is_dir():
            yield from _images(entry)
        elif _is_image(entry):
            yield entry


def _read(file: Path, size: int, grayscale: bool) -> np.ndarray:
    """One file as uint8 [size, size, C]; transparency becomes white."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
                pixels = np.asarray(image).clip(0, 65535) >> 8
                image = Image.fromarray(pixels.astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("it holds floating-point values, whose range is unknown")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = ImageOps.fit(image.convert("L" if grayscale else "RGB"), (size, size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {file}: {error}") from None
    return np.asarray(image).reshape(size, size, -1)
