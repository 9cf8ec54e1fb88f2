"""Draw as many images from a model as a comparison wants, in batches that depend on no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import InputError
from fastdiff.common.world import World
from fastdiff.data.order import stream_generator
from fastdiff.generation import Samples
from fastdiff.samplers import Sampler
from fastdiff.sde import Solver

BATCH = 256  # images that share a source of noise; other numbers would give other images


def draw_in_batches(
    checkpoint: Checkpoint,
    sampler: Sampler | Solver,
    *,
    count: int | None = None,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    world: World | None = None,
    **options: Any,
) -> Iterator[Samples]:
    """Generate images batch by batch, so that memory does not grow with their number.

    The noise of a batch depends on the seed and on the batch's number alone, so that processes can
    share the batches.

    Args:
        checkpoint: the model.
        sampler: of this model, from ``checkpoint.diffusion().sampler``.
        count: number of images; None for the number of labels.
        labels: class of each image, for a model with classes or a classifier.
        seed: of all noise.
        world: processes that share the batches, and are each given all images; None for this one
            alone.
        **options: of ``Checkpoint.generate``, such as ``guidance``.

    Raises:
        InputError: as ``Checkpoint.generate`` does.
    """
    count = len(labels or ()) if count is None else count
    world = World() if world is None else world

    def drawn(number: int) -> Samples:
        begin = min(number * BATCH, count)
        size = min(BATCH, count - begin)
        return checkpoint.generate(
            sampler,
            count=size,
            labels=None if labels is None else list(labels[begin : begin + size]),
            generator=stream_generator(seed, "evaluation", number),
            batch_size=BATCH,
            progress=False,
            **options,
        )

    for first in range(0, -(-count // BATCH), world.count):
        own = drawn(first + world.rank)  # of no image, if there are fewer batches than processes
        left = count - first * BATCH
        for rank in range(world.count):
            size = max(0, min(BATCH, left - rank * BATCH))
            if size:
                yield Samples(
                    *(world.of(rank, part, size) for part in (own.images, own.evaluations))
                )


def balanced_labels(count: int, classes: int, seed: int = 0) -> list[int]:
    """Labels of ``count`` images, equally many of each class but for one, in random order."""
    return _in_shares(count, torch.ones(classes, dtype=torch.float64, device="cpu"), seed)


def labels_like(count: int, labels: Tensor, classes: int, seed: int = 0) -> list[int]:
    """Labels of ``count`` images in the proportions of ``labels`` int64 [N], in random order."""
    return _in_shares(count, labels.bincount(minlength=classes).double(), seed)


def _in_shares(count: int, shares: Tensor, seed: int) -> list[int]:
    if not bool((shares > 0).any()):
        raise InputError("there is no class to draw from")
    ends = shares.cumsum(0) / shares.sum()
    # Evenly spaced places in 0..1: each class gets its share, rounded down or up.
    places = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
    labels = torch.searchsorted(ends, places, right=True).clamp(max=len(shares) - 1)
    order = torch.randperm(count, generator=stream_generator(seed, "labels", 0), device="cpu")
    return labels[order].tolist()
