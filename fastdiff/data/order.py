"""The order of the images in training, and a source of random numbers for each use and step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.training_images import TrainingImages


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


class Lookahead:
    """Keeps images reading their next batches while a step computes.

    Args:
        images: to read.
        order: the indices, int64 [B], that a step will read.
        end: number of the step after the last, beyond which nothing is wanted.
    """

    def __init__(self, images: TrainingImages, order: Callable[[int], Tensor], end: int) -> None:
        self._images, self._order, self._end = images, order, end
        self._told = 0  # steps below this have been told of

    def __call__(self, step: int) -> None:
        """Tell the images, before step ``step`` reads, what it and the next steps want."""
        wanted = range(step, min(step + self._images.ahead, self._end - 1) + 1)
        for later in wanted if self._images.ahead else ():
            if later >= self._told:
                self._images.prefetch(self._order(later))
        self._told = max(self._told, wanted.stop)


@lru_cache(maxsize=2)
def _permutation(count: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=stream_generator(seed, "order", epoch), device="cpu")
