"""How a process takes its share of a batch: in micro-batches, whose gradients add up."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdiff.common.world import World
from fastdiff.nn.wrappers import is_distributed


def split(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """Cut start..stop into ``parts`` consecutive ranges, whose sizes differ by at most 1.

    Ranges that would be empty are left out.
    """
    size = stop - start
    ends = [start + size * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in itertools.pairwise(ends) if a < b]


def parallel(model: nn.Module, world: World) -> nn.Module:
    """The model with gradients that are the mean over all processes.

    Gradients have the strides that the parameters have now.
    """
    if world.count == 1 or is_distributed(model):
        return model
    # The gradients are views of what travels, which saves a copy of them and its memory.
    with world.lost_as_errors():
        return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextmanager
def exchange(model: nn.Module, now: bool) -> Iterator[None]:
    """For a ``with`` block of forward and backward, whether the processes exchange gradients.

    Without it a process adds them to those that it has.
    """
    wrappers = [part for part in model.modules() if isinstance(part, DistributedDataParallel)]
    if now or not wrappers:
        yield
        return
    with wrappers[0].no_sync():
        yield


@contextmanager
def settling() -> Iterator[None]:
    """For a ``with`` block, the first backward pass of DistributedDataParallel, without its advice.

    It warns of weights with a dimension of length 1, whose strides mean the same either way.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        yield
