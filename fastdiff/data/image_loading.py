"""From a source to images to train on: all in memory if they fit, else read while training."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from fastdiff.common.errors import DataError
from fastdiff.common.progress import progress_bar
from fastdiff.data.image_file import Depth, Reading
from fastdiff.data.image_reader import NAMED_FILES, REQUEST, ImageReader
from fastdiff.data.image_set import ImageSet
from fastdiff.data.image_source import ImageSource
from fastdiff.data.lazy_images import LazyImages
from fastdiff.data.reading_workers import Image, ReadingWorkers, Unread
from fastdiff.data.training_images import TrainingImages

SMALL = 1000  # so many images are read sooner than processes for them begin
SAMPLE = 1024  # images that are looked at before training, where not all are read

log = logging.getLogger(__name__)


def load(
    source: ImageSource,
    reading: Reading,
    *,
    cache: int,
    workers: int = 0,
    flip: bool = False,
    skip_bad: bool = False,
    scale: float = 1.0,
    progress: bool = True,
) -> TrainingImages:
    """The images of a source, all in memory if they fit into ``cache`` bytes.

    Otherwise they are read while the model trains, and up to ``cache`` bytes of them are kept. Then
    a sample of them is read at once, so that a folder that cannot be read is an error before
    training and not in its middle. Latents, and images that are cut at a random place, are always
    read while the model trains.

    Args:
        source: of the images.
        reading: how they become pixels.
        cache: bytes of memory for images.
        workers: number of processes that read; 0 reads in the calling thread.
        flip: in training, mirror a random half of the images left to right.
        skip_bad: do without images that cannot be read, and say so in the log. Where all are read
            at first, they are left out; otherwise the next image of the class is in their place.
        scale: multiplies latents.
        progress: show a progress bar on standard error.

    Raises:
        DataError: see :func:`read_all`; :class:`LazyImages`.
    """
    source.check(reading)
    size = len(source) * source.channels(reading) * reading.size**2
    if size <= cache and reading.crop == "center" and not source.latents:
        if scale != 1:
            raise DataError("a scale (--latent-scale) is for latents, and these images are pixels")
        return read_all(
            source, reading, workers=workers, flip=flip, skip_bad=skip_bad, progress=progress
        )
    reader = ImageReader(source, reading, workers=workers, cache=cache, skip_bad=skip_bad)
    images = LazyImages(reader, flip=flip, scale=scale)
    _look_at(source, reader.workers, reading, skip_bad, progress)
    return images


def read_all(
    source: ImageSource,
    reading: Reading,
    *,
    workers: int = 0,
    flip: bool = False,
    skip_bad: bool = False,
    progress: bool = True,
) -> ImageSet:
    """All images of a source, in memory.

    Args:
        source: of the images.
        reading: how they become pixels; ``crop`` must be "center".
        workers: number of processes that read; 0 reads in the calling thread.
        flip: in training, mirror a random half of the images left to right.
        skip_bad: leave out images that cannot be read, and log how many.
        progress: show a progress bar on standard error.

    Raises:
        DataError: images that cannot be read, which the text names with the reasons; with
            ``skip_bad`` only if no image of the source, or of a class, is left. ``value_range`` is
            given and no file has more than 8 bits a value.
    """
    source.check(reading)
    count, channels, size = len(source), source.channels(reading), reading.size
    pixels = torch.empty(count, channels, size, size, dtype=torch.uint8, device="cpu")
    into = pixels.numpy()
    good = torch.ones(count, dtype=torch.bool, device="cpu")
    bad: list[str] = []
    depths: list[tuple[int, Depth]] = []
    pool = ReadingWorkers(source, reading, workers if count > SMALL else 0)
    shown = progress_bar(total=count, desc="reading images", unit=" images", shown=progress)
    with shown as bar:
        for index, image in _read(pool, range(count)):
            bar.update()
            if isinstance(image, Unread):
                good[index] = False
                bad.append(image.text)
                continue
            into[index] = image[0].transpose(2, 0, 1)
            if image[1] is not None:
                depths.append((index, image[1]))
    _check_read(bad, count, skip_bad)
    labels = source.labels
    if bad:
        _check_classes(source, good, bad)
        pixels, labels = pixels[good], None if labels is None else labels[good]
    _check_depths(source, reading, depths)
    if reading.value_range is not None and not depths:
        raise DataError(
            "value_range (--value-range) is for files of more than 8 bits a value; "
            f"{source.name} has none"
        )
    return ImageSet(pixels, labels, source.classes, source.name, flip)


def _look_at(
    source: ImageSource, pool: ReadingWorkers, reading: Reading, skip_bad: bool, progress: bool
) -> None:
    """Read some images, evenly spaced, for the errors and warnings that there are of them."""
    bad: list[str] = []
    depths: list[tuple[int, Depth]] = []
    chosen = spaced(len(source), SAMPLE)
    shown = progress_bar(
        total=len(chosen), desc="looking at images", unit=" images", shown=progress
    )
    with shown as bar:
        for index, image in _read(pool, chosen.tolist()):
            bar.update()
            if isinstance(image, Unread):
                bad.append(image.text)
            elif image[1] is not None:
                depths.append((index, image[1]))
    _check_read(bad, len(chosen), skip_bad)
    _check_depths(source, reading, depths)


def spaced(count: int, most: int) -> Tensor:
    """At most ``most`` numbers of 0..count-1, evenly spaced, int64."""
    few = min(count, most)
    return torch.arange(few, device="cpu") * count // max(1, few)


def _read(pool: ReadingWorkers, indices: Sequence[int]) -> Iterator[tuple[int, Image]]:
    """Images with their numbers, in order, while the next are being read."""
    pending: deque[tuple[Sequence[int], Future[list[Image]]]] = deque()
    for start in range(0, len(indices), REQUEST):
        request = indices[start : start + REQUEST]
        pending.append((request, pool.read(request)))
        if len(pending) > 2 * pool.count:
            yield from _answer(*pending.popleft())
    for request, future in pending:
        yield from _answer(request, future)


def _answer(request: Sequence[int], future: Future[list[Image]]) -> Iterable[tuple[int, Image]]:
    return zip(request, future.result(), strict=True)


def _check_read(bad: list[str], count: int, skip_bad: bool) -> None:
    """DataError for images that could not be read, or a line in the log with ``skip_bad``."""
    if not bad:
        return
    which = "the image" if len(bad) == 1 else f"{len(bad)} of {count} images:"
    if not skip_bad:
        raise DataError(
            f"cannot read {which} {_named(bad)} (skip_bad=True, --skip-bad, skips such files)"
        )
    log.warning("left out %d of %d images that cannot be read: %s", len(bad), count, _named(bad))


def _check_classes(source: ImageSource, good: Tensor, bad: list[str]) -> None:
    """DataError if no image, or none of a class, can be read."""
    labels = torch.zeros(len(source), dtype=torch.int64) if source.labels is None else source.labels
    counts = torch.bincount(labels[good], minlength=len(source.classes) or 1)
    for label, left in enumerate(counts.tolist()):
        if not left:
            where = source.class_place(label if source.classes else None)
            raise DataError(f"none of the images in {where} can be read: {_named(bad)}")


def _named(bad: list[str]) -> str:
    more = f"; and {len(bad) - NAMED_FILES} more" if len(bad) > NAMED_FILES else ""
    return "; ".join(bad[:NAMED_FILES]) + more


def _check_depths(source: ImageSource, reading: Reading, depths: list[tuple[int, Depth]]) -> None:
    """Warn of every kind of file in which no value reaches half of the assumed range.

    Files of one kind are judged together, since a single image may just be dark.
    """
    kinds: dict[tuple[str, int], list[tuple[int, Depth]]] = {}
    for index, depth in depths if reading.value_range is None else ():
        kinds.setdefault((depth.kind, depth.white), []).append((index, depth))
    for (kind, white), entries in kinds.items():
        index, brightest = max(entries, key=lambda entry: entry[1].largest)
        largest = int(brightest.largest)
        if 0 < largest <= white // 2:
            bits = max(8, largest.bit_length())
            warnings.warn(
                f"fastdiff: the largest value in the files of kind {kind} ({len(entries)} of them) "
                f"is {largest}, in {source.place(index)}; read with {white} as white, their "
                f"brightest pixel is {largest * 256 // (white + 1)} of 255. If {2**bits - 1} is "
                f"white, pass value_range=(0, {2**bits - 1}) (--value-range 0 {2**bits - 1}); "
                f"(0, {white}) keeps the images dark without this warning",
                stacklevel=4,
            )
