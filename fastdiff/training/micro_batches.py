"""The gradient of a step: every process takes its share of the batch in micro-batches."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdiff.common.errors import TrainingError, memory_refused
from fastdiff.common.seeds import seeded
from fastdiff.common.world import World
from fastdiff.data.order import stream_seed
from fastdiff.nn.wrappers import is_distributed
from fastdiff.ops.profiling import span
from fastdiff.training.batches import Batch, Draws
from fastdiff.training.shards import Shards
from fastdiff.training.training_options import TrainingOptions


class MicroBatches:
    """Gives parameters the gradient of the mean loss of a step's whole batch.

    The gradients of a process's micro-batches add up, and those of the processes are averaged: by
    PyTorch's DistributedDataParallel during the last backward pass; or, if micro-batches may be
    halved, after it, when it is known that every process had the memory for its own. Those of a
    network in shards are averaged by its own backward pass.

    Args:
        parameters: of the network.
        called: makes what is called for the network, when it is first needed.
        losses: the losses of a batch's images, [N], by what ``called`` made.
        read: the images of draws.
        world: the processes.
        options: of the training.
        shards: of the network; None if it is whole in every process.

    Attributes:
        model: what is called for the network.
        waited: seconds for which the last step waited for its images.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        called: Callable[[], nn.Module],
        losses: Callable[[Batch], Tensor],
        read: Callable[[Draws], Batch],
        world: World,
        options: TrainingOptions,
        shards: Shards | None = None,
    ) -> None:
        self._shards = shards
        self._parameters, self._called, self._losses, self._read = parameters, called, losses, read
        self._world, self._seed = world, options.seed
        self._halve = options.on_oom == "halve"
        self._count = options.accumulate  # of micro-batches
        # DistributedDataParallel settles by its first backward pass in which order it adds up
        # gradients. That pass is repeated, so that a resumed run adds in the same order as one
        # that was never interrupted.
        self._settled = world.count == 1 or self._halve or shards is not None
        self.waited = 0.0

    @cached_property
    def model(self) -> nn.Module:
        """What is called for the network; its gradients have the strides of the parameters now."""
        model = self._called()
        alone = self._world.count == 1 or self._halve
        if alone or self._shards is not None or is_distributed(model):
            return model
        # The gradients are views of what travels, which saves a copy of them and its memory.
        with self._world.lost_as_errors():
            return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def gradient(self, step: int, draws: Draws) -> Tensor:
        """Compute the gradient of step ``step``.

        Args:
            step: number of the step.
            draws: of its whole batch.

        Returns:
            The losses of the images of the whole batch, [N] on the CPU.

        Raises:
            TrainingError: there is not enough memory for a single image, if micro-batches may be
                halved.
        """
        self.waited = 0.0
        if not self._settled:
            with _without_advice():
                self._add_up(step, draws)
            self._settled = True
        found = self._halving(step, draws) if self._halve else self._add_up(step, draws)
        if self._shards is not None:
            self._shards.take_gradients()
        return self._world.joined(found, len(draws))

    def _add_up(self, step: int, draws: Draws) -> Tensor:
        """Add up the gradients of this process's share; the losses of its images."""
        size, found = len(draws), []
        parts = split(*self._world.share(size), self._count)
        for p in self._parameters:
            p.grad = None
        for start, stop in parts:
            last = (start, stop) == parts[-1] and not self._halve
            with self._dropout(step, start), self._exchange(now=last):
                began = time.perf_counter()
                with span("data"):
                    batch = self._read(draws.part(start, stop))
                self.waited += time.perf_counter() - began
                with span("forward"):
                    losses = self._losses(batch)
                    found.append(losses.detach())
                with span("backward"):
                    weighted = batch.weights.to(losses.device, losses.dtype) * losses
                    (weighted.sum() / (size / self._world.count)).backward()
        return torch.cat(found)

    def _halving(self, step: int, draws: Draws) -> Tensor:
        """As :meth:`_add_up`, in smaller micro-batches if those of any process do not fit."""
        while True:
            found, refused = self._try(step, draws)
            if not self._world.largest(refused is not None):
                self._world.average([p.grad for p in self._parameters if p.grad is not None])
                assert found is not None
                return found
            found = None
            start, stop = self._world.share(len(draws))
            largest = self._world.largest(-(-(stop - start) // self._count))
            if largest == 1:
                raise TrainingError(f"a single image does not fit: {refused or 'no memory'}")
            self._count *= 2
            if self._world.first:
                warnings.warn(
                    f"fastdiff: micro-batches of {largest} images do not fit into memory"
                    f"{f' ({refused})' if refused else ''}; the step is repeated and the run goes "
                    f"on in micro-batches of up to {-(-largest // 2)}",
                    stacklevel=6,
                )

    def _try(self, step: int, draws: Draws) -> tuple[Tensor | None, str | None]:
        """The losses, or why there was no memory for them."""
        try:
            return self._add_up(step, draws), None
        except (MemoryError, RuntimeError) as error:
            refused = memory_refused(error)
            if refused is None:
                raise
        # Here the error is gone, and with it what its frames held.
        for p in self._parameters:
            p.grad = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None, refused

    @contextmanager
    def _dropout(self, step: int, first: int) -> Iterator[None]:
        """Torch's generators for the dropout of the part of a batch that begins at ``first``."""
        stream = f"dropout from image {first}" if first else "dropout"
        with seeded(stream_seed(self._seed, stream, step), self._parameters[0].device):
            yield

    @contextmanager
    def _exchange(self, now: bool) -> Iterator[None]:
        """For a ``with`` block of forward and backward, whether processes exchange gradients.

        Without it a process adds them to those that it has.
        """
        if self._shards is not None:
            self._shards.exchange(now)
        parts = (part for part in self.model.modules() if isinstance(part, DistributedDataParallel))
        wrapper = None if now else next(parts, None)
        with nullcontext() if wrapper is None else wrapper.no_sync():
            yield


def split(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """Cut start..stop into ``parts`` consecutive ranges, whose sizes differ by at most 1.

    Ranges that would be empty are left out.
    """
    size = stop - start
    ends = [start + size * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in pairwise(ends) if a < b]


@contextmanager
def _without_advice() -> Iterator[None]:
    """For a ``with`` block, silence what DistributedDataParallel says of its first gradients.

    It warns of weights with a dimension of length 1, whose strides mean the same either way.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        yield
