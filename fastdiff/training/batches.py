"""What each step trains on.

All that is random in a step is drawn for its whole batch, and a part of the batch takes its share
of it. So an image has the same time, noise and mirroring whichever process or micro-batch it falls
to, and only the images of a part are read.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastdiff.common.estimates import SHARE
from fastdiff.common.inputs import checked_seeds, laid_out
from fastdiff.common.world import World
from fastdiff.data.order import Lookahead, batch_indices, stream_generator, stream_seed
from fastdiff.data.training_images import TrainingImages
from fastdiff.objectives import Objective
from fastdiff.training.training_options import TrainingOptions


@dataclass(frozen=True)
class Draws:
    """What is drawn for N consecutive images of a step's batch, on the CPU.

    Attributes:
        indices: numbers of the images in the data, int64 [N].
        t: times, [N] or a row an image, from the objective's ``draw``.
        weights: importance weights of the times, float64 [N].
        seeds: of the noise, int64 [N, 2]: a seed and the image's place in the whole batch; or, if
            the objective pairs each image with a noise of its own, the seeds of that.
        mirrored: which images are mirrored left to right, bool [N], or None.
        corners: where images are cut, float32 [N, 2], or None; see
            :meth:`fastdiff.data.TrainingImages.draw_corners`.
        hidden: which labels are hidden from the model, bool [N], or None.
        estimated: which images a self-conditioned model gets an estimate of, bool [N], or None.
    """

    indices: Tensor
    t: Tensor
    weights: Tensor
    seeds: Tensor
    mirrored: Tensor | None = None
    corners: Tensor | None = None
    hidden: Tensor | None = None
    estimated: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, start: int, stop: int) -> Draws:
        """The draws of the images ``start`` to ``stop``, without the latter."""
        whole = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: v[start:stop] for name, v in whole.items() if v is not None})


@dataclass(frozen=True)
class Batch:
    """N images to train on, with all that their loss depends on, on one device.

    Attributes:
        x0: clean images, float32 [N, C, S, S] in [-1, 1].
        labels: classes, int64 [N]; the number of classes stands for a hidden label. Or None.
        t: times, see :class:`Draws`.
        weights: importance weights of the times, float64 [N].
        noise: seeds of the noise, int64 [N, 2], or the noise itself, standard normal like ``x0``.
        estimated: see :class:`Draws`; on the CPU.
    """

    x0: Tensor
    labels: Tensor | None
    t: Tensor
    weights: Tensor
    noise: Tensor
    estimated: Tensor | None = None


def draw(data: TrainingImages, objective: Objective, options: TrainingOptions, step: int) -> Draws:
    """What step ``step`` draws for its whole batch; a function of the seed and the step alone."""
    seed, size = options.seed, options.batch_size
    generator = stream_generator(seed, "step", step)
    mirrored = data.draw_mirrored(size, generator)
    corners = data.draw_corners(size, generator)
    t, weights = objective.draw(size, generator, step)
    hidden = None
    if data.classes and options.label_dropout:
        hidden = torch.rand(size, generator=generator, device="cpu") < options.label_dropout
    estimated = None
    if options.self_condition:
        estimated = torch.rand(size, generator=generator, device="cpu") < SHARE
    indices = batch_indices(len(data), size, step, seed)
    pairs = None if objective.plan is None else objective.plan.seeds
    if pairs is None:
        seeds = checked_seeds(stream_seed(seed, "noise", step), None, size)
    else:
        seeds = pairs[indices]
    return Draws(
        indices,
        t,
        weights,
        seeds,
        mirrored,
        corners,
        hidden,
        estimated,
    )


def read(
    data: TrainingImages, draws: Draws, device: torch.device, memory_format: torch.memory_format
) -> Batch:
    """The images of ``draws`` with what was drawn for them.

    Args:
        data: the images and labels that ``draws`` was made for.
        draws: of a batch or of a part of it.
        device: where the batch is wanted.
        memory_format: of its images.
    """
    x0, labels = data.read(draws.indices, draws.mirrored, draws.corners)
    if labels is not None and draws.hidden is not None:
        labels = labels.masked_fill(draws.hidden, len(data.classes))
    return Batch(
        laid_out(x0, device, memory_format),
        None if labels is None else labels.to(device),
        draws.t.to(device),
        draws.weights.to(device),
        draws.seeds.to(device),
        draws.estimated,
    )


def lookahead(data: TrainingImages, options: TrainingOptions, world: World) -> Lookahead:
    """Tells the images which of them this process of ``world`` will read in the next steps."""
    count, share = len(data), slice(*world.share(options.batch_size))

    def order(step: int) -> Tensor:
        return batch_indices(count, options.batch_size, step, options.seed)[share]

    return Lookahead(data, order, options.steps)
