"""Reads images of a source when they are wanted, and keeps what fits into a bound of memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import chain

import numpy as np

from fastdiff.common.errors import DataError
from fastdiff.data.image_file import Reading
from fastdiff.data.image_source import ImageSource
from fastdiff.data.reading_workers import Image, ReadingWorkers, Unread

OBJECT = 200  # bytes of an array and its entry in the cache beside its values
REQUEST = 64  # images that a process reads at a time, at most
NAMED_FILES = 10  # number of unreadable files that the log names
SUBSTITUTES = 100  # images in a row that may be unreadable

log = logging.getLogger(__name__)


class ImageReader:
    """Images of a source by their number, from memory or from their files.

    The cache keeps the first images that are read, until its bytes are used up, and gives up none:
    training visits the images in random permutations, in which one read long ago is wanted again as
    soon, on average, as one read just now. So of a cache that holds a share of the images that
    share of all readings comes from it, while with the rule "least recently used" the most of them
    would be thrown out shortly before they are wanted.

    Args:
        source: of the images.
        reading: how they become pixels.
        workers: number of processes that read; 0 reads in the calling thread.
        cache: the largest number of bytes of images to keep.
        skip_bad: in place of an image that cannot be read take the next one of its class, and say
            so in the log.

    Attributes:
        kept: bytes that the cache uses.
    """

    def __init__(
        self,
        source: ImageSource,
        reading: Reading,
        *,
        workers: int = 0,
        cache: int = 0,
        skip_bad: bool = False,
    ) -> None:
        self.source, self.reading = source, reading
        self.workers = ReadingWorkers(source, reading, workers)
        self.kept = 0
        self._limit, self._skip_bad = cache, skip_bad
        self._cache: dict[int, np.ndarray] = {}
        self._coming: dict[int, tuple[Future[list[Image]], int]] = {}
        self._bad: set[int] = set()

    def prefetch(self, indices: Iterable[int]) -> None:
        """Request the images that are neither in memory nor requested already."""
        missing = [i for i in dict.fromkeys(indices) if not self._is_known(i)]
        each = min(REQUEST, -(-len(missing) // max(1, self.workers.count)))
        for start in range(0, len(missing), max(1, each)):
            request = missing[start : start + each]
            future = self.workers.read(request)
            for place, index in enumerate(request):
                self._coming[index] = (future, place)

    def images(self, indices: Iterable[int]) -> list[np.ndarray]:
        """The images of ``indices``, ``[H, W, C]`` each.

        Raises:
            DataError: an image cannot be read.
        """
        wanted = list(indices)
        self.prefetch(wanted)
        found = {index: self._image(index) for index in dict.fromkeys(wanted)}
        return [found[index] for index in wanted]

    def _is_known(self, index: int) -> bool:
        return index in self._cache or index in self._coming or index in self._bad

    def _image(self, index: int) -> np.ndarray:
        if index in self._cache:
            return self._cache[index]
        image = None if index in self._bad else self._read(index)
        if isinstance(image, np.ndarray):
            return image
        if image is not None:
            if not self._skip_bad:
                raise DataError(
                    f"cannot read the image {image.text} (skip_bad=True, --skip-bad, takes another "
                    "in its place)"
                )
            self._note(index, image)
        return self._substitute(index)

    def _note(self, index: int, image: Unread) -> None:
        self._bad.add(index)
        if len(self._bad) <= NAMED_FILES:
            log.warning("an image that cannot be read is replaced by another: %s", image.text)

    def _read(self, index: int) -> np.ndarray | Unread:
        """An image that was requested or is requested now; if there is room, it is kept."""
        if index not in self._coming:
            self.prefetch([index])
        future, place = self._coming.pop(index)
        image = future.result()[place]
        if isinstance(image, Unread):
            return image
        pixels = image[0]
        if self.kept + pixels.nbytes + OBJECT <= self._limit:
            self._cache[index] = pixels
            self.kept += pixels.nbytes + OBJECT
        return pixels

    def _substitute(self, index: int) -> np.ndarray:
        """The next readable image of the same class: the same whenever it is asked for."""
        for other in self._after(index):
            if other in self._bad:
                continue
            image = self._cache[other] if other in self._cache else self._read(other)
            if isinstance(image, np.ndarray):
                return image
            self._note(other, image)
        raise DataError(
            f"cannot read {self.source.place(index)}, nor the next images of its class, up to "
            f"{SUBSTITUTES} of them"
        )

    def _after(self, index: int) -> Iterator[int]:
        """The next images of the class of an image; after the last comes the first."""
        count, labels = len(self.source), self.source.labels
        left = SUBSTITUTES
        for other in chain(range(index + 1, count), range(index)):
            if labels is None or labels[other] == labels[index]:
                yield other
                left -= 1
                if not left:
                    return
