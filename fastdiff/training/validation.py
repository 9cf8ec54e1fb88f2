"""The loss of images that are not trained on, at the same times and noise at every call.

A training loss jumps from batch to batch, since its times and noise are new. Here each image keeps
its times and its noise: from one call to the next only the weights differ, so a curve is smooth,
and the curves of two runs on the same images can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.common.errors import DataError, InputError
from fastdiff.common.inputs import checked_seeds, laid_out
from fastdiff.common.world import World, present
from fastdiff.data.order import stream_seed
from fastdiff.data.training_images import TrainingImages
from fastdiff.objectives import Objective
from fastdiff.sampling.quick import quick
from fastdiff.training.training_options import TrainingOptions

FEWEST = 512  # losses that a mean is taken of at least, so that every part of the times has some
PARTS = 4  # of the times, from the least noise to the most, with a mean of their own
GOLDEN = (math.sqrt(5) - 1) / 2


class ValidationLoss:
    """Measures the losses of networks on images.

    The times are the middles of M equal parts of the objective's distribution of times. They are
    dealt to the images in the order of the multiples of the golden ratio modulo 1, which spreads
    them evenly over any images that follow one another, such as those of a class. The noise comes
    from a counter. Neither depends on a run's seed. The processes of a run share the batches, which
    are the same whatever the number of processes, and so are the losses.

    Args:
        objective: whose loss is measured, without importance weights.
        images: to measure it on; few images are taken several times, at other times.
        batch_size: images in a call of the network.
        bf16: call the network under bfloat16 autocast, as in training.
        memory_format: of the images.
        self_condition: the networks are self-conditioned, and every other image gets the estimate
            of a first pass, as half of the images do in training.
        world: the processes that share the work, None for all of torch's default group.
    """

    def __init__(
        self,
        objective: Objective,
        images: TrainingImages,
        *,
        batch_size: int,
        bf16: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
        self_condition: bool = False,
        world: World | None = None,
    ) -> None:
        count = len(images) * -(-FEWEST // len(images))
        self.images = images
        self._objective, self._bf16, self._memory_format = objective, bf16, memory_format
        self._self_condition, self._world = self_condition, world or present()
        self._shares = spread(count)
        self._times = objective.quantiles(self._shares)
        self._seeds = checked_seeds(stream_seed(0, "validation", 0), None, count)
        self._batches = torch.arange(count, device="cpu").split(batch_size)

    def __call__(self, network: nn.Module) -> tuple[float, list[float]]:
        """The mean loss, and the means over each of :data:`PARTS` parts of the times in order.

        The network is called in eval mode, by fused operations where it can be.
        """
        losses = self.losses(network)
        parts = (self._shares * PARTS).long()
        return float(losses.mean()), [float(losses[parts == k].mean()) for k in range(PARTS)]

    def of_both(self, averaged: nn.Module, raw: nn.Module) -> dict[str, Any]:
        """The losses of the averaged model and of the model itself, by the names of logs."""
        mean, parts = self(averaged)
        return {
            "validation_loss": mean,
            "validation_loss_raw": self(raw)[0],
            "validation_loss_parts": parts,
        }

    @torch.no_grad()
    def losses(self, network: nn.Module) -> Tensor:
        """All losses, float64 [M]: of the images in their order, again and again.

        All processes that share the work must call this.

        Raises:
            ValueError: another process could not measure its share; in that one, what it met with.
        """
        world, own = self._world, torch.empty(0, dtype=torch.float64, device="cpu")
        error: Exception | None = None
        try:
            own = self._of_share(network, *world.share(len(self._batches)))
        except Exception as raised:  # the others must hear of it before they wait for this share
            error = raised
        failed = world.largest(int(error is not None))
        if error is not None:
            raise error
        if failed:
            raise ValueError("another process of the run could not measure its share")
        parts = []
        for rank in range(world.count):
            start, stop = World(rank, world.count).share(len(self._batches))
            parts.append(world.of(rank, own, sum(map(len, self._batches[start:stop]))))
        return torch.cat(parts)

    def _of_share(self, network: nn.Module, start: int, stop: int) -> Tensor:
        """The losses of some of the batches, float64 [n]."""
        found = [torch.empty(0, dtype=torch.float64, device="cpu")]
        device = next(network.parameters()).device
        with _in_eval_mode(network):
            called = quick(network)
            for places in self._batches[start:stop]:
                x0, labels = self.images.read(places % len(self.images))
                found.append(self._of_batch(called, x0, labels, places, device))
        return torch.cat(found)

    def _of_batch(
        self, called: Any, x0: Tensor, labels: Tensor | None, places: Tensor, device: torch.device
    ) -> Tensor:
        cond = {} if labels is None else {"class_labels": labels.to(device)}
        x0 = laid_out(x0, device, self._memory_format)
        t, seeds = self._times[places].to(device), self._seeds[places].to(device)

        def model(
            x_t: Tensor, t: Tensor, *, class_labels: Tensor | None = None, **estimate: Tensor
        ) -> Any:
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                return called(x_t, t, class_labels, **estimate)

        used: Any = model
        if self._self_condition:
            used = self._objective.aided(model, t, places % 2 == 0)
        losses = self._objective.losses(used, x0, t, seeds, **cond)
        return losses.double().cpu()


def of_run(
    objective: Objective,
    images: TrainingImages | None,
    data: TrainingImages,
    options: TrainingOptions,
    memory_format: torch.memory_format,
) -> ValidationLoss | None:
    """The loss of a run's images to validate with, None if it has none.

    Args:
        objective: of the run.
        images: to validate with.
        data: to train on.
        options: of the run.
        memory_format: of the images.

    Raises:
        InputError: the images are not like those to train on.
    """
    if images is None:
        return None
    given, wanted = ((each.shape, each.classes) for each in (images, data))
    if given != wanted:
        raise InputError(
            "images to validate with must have the shape and classes of those to "
            f"train on, {wanted}, got {given}"
        )
    return ValidationLoss(
        objective, images, batch_size=options.batch_size, bf16=options.bf16,
        memory_format=memory_format, self_condition=options.self_condition,
        world=World() if options.shard else None,  # the first process alone has whole weights
    )  # fmt: skip


def spread(count: int) -> Tensor:
    """The middles of ``count`` equal parts of 0..1 in an evenly mixed order, float64 [count]."""
    multiples = torch.arange(count, dtype=torch.float64, device="cpu") * GOLDEN % 1
    return (multiples.argsort().argsort().double() + 0.5) / count


def hold_out(images: TrainingImages, fraction: float) -> tuple[TrainingImages, TrainingImages]:
    """Split images into those to train on and those to validate with.

    Held out is every k-th image of each class, or every k-th image without classes, where k is
    the whole number next to 1 / ``fraction``.

    Args:
        images: all images.
        fraction: the share to hold out, above 0 and at most 0.5.

    Raises:
        InputError: a fraction outside its range.
        DataError: there are too few images to hold one out.
    """
    if not 0 < fraction <= 0.5:
        raise InputError(f"the share of images to hold out must lie in (0, 0.5], got {fraction}")
    every = round(1 / fraction)
    held_out = torch.zeros(len(images), dtype=torch.bool, device="cpu")
    if images.labels is None:
        held_out[every - 1 :: every] = True
    else:
        for label in images.labels.unique().tolist():
            held_out[(images.labels == label).nonzero().flatten()[every - 1 :: every]] = True
    if not bool(held_out.any()):
        kind = "images" if images.labels is None else "images in any class"
        raise DataError(f"to hold out one of {every}, there are too few {kind}")
    rest, chosen = (images.subset(mask.nonzero().flatten()) for mask in (~held_out, held_out))
    return rest, chosen


@contextmanager
def _in_eval_mode(network: nn.Module) -> Iterator[None]:
    """For a ``with`` block, put all modules into eval mode, and each back into its own."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
