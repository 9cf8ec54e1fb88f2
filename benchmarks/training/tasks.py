"""What is trained: diffusers' networks with seeded random weights, on images in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.unet.models import NETWORKS, Network, unet
from fastdiff import data, schedules
from fastdiff.checkpoints.checkpoint import CONFIG, PRETRAINED
from fastdiff.data import ImageSet
from fastdiff.schedules import NoiseSchedule


class Batch(NamedTuple):
    """What one step trains on, all but the network.

    Attributes:
        x0: clean images [N, C, S, S].
        labels: classes, int64 [N], or None.
        t: timesteps, int64 [N].
        noise: standard normal, like ``x0``.
    """

    x0: Tensor
    labels: Tensor | None
    t: Tensor
    noise: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        """The same images and noise in another dtype, channels-last."""
        images = (v.to(dtype, memory_format=torch.channels_last) for v in (self.x0, self.noise))
        x0, noise = images
        return Batch(x0, self.labels, self.t, noise)


@dataclass(frozen=True)
class Task:
    """A network and its training.

    Attributes:
        network: in diffusers' class.
        batch: images in a step, unless the command line says otherwise.
        images: makes the images to train on, and their labels if the network takes any.
        schedule: of the noise.
        prediction: "eps" or "v" (Salimans & Ho 2022, arXiv:2202.00512).
        clip: largest norm of the gradient; None for no limit.
        trainer: whether fastdiff takes the step by its ``Trainer``, with its own network of the
            same weights; else by its compiler alone, in the loop that the peers have.
    """

    network: Network
    batch: int
    images: Callable[[], ImageSet]
    schedule: NoiseSchedule
    prediction: str = "eps"
    clip: float | None = None
    trainer: bool = False

    def module(self) -> nn.Module:
        """The network in float32, channels-last and training mode, the same in every process."""
        module = self.network.make().train().requires_grad_(True)
        return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def draw(self, images: ImageSet, size: int, generator: torch.Generator | None = None) -> Batch:
        """A batch of ``size`` images, drawn from torch's global generator unless one is given."""
        chosen = torch.randint(len(images), (size,), generator=generator)
        x0 = images.images[chosen].contiguous(memory_format=torch.channels_last)
        labels = None if images.labels is None else images.labels[chosen]
        t = torch.randint(self.schedule.num_timesteps, (size,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        return Batch(x0, labels, t, noise.contiguous(memory_format=torch.channels_last))


def _random_images(size: int) -> ImageSet:
    """256 images of noise: the time of a step does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    return ImageSet(torch.rand(256, 3, size, size, generator=generator) * 2 - 1)


def _digits(size: int) -> ImageSet:
    return data.digits("train", size)


def _digits_config() -> dict[str, Any]:
    """Of the model that comes with fastdiff, as diffusers' class takes it."""
    config = json.loads((PRETRAINED / "digits" / CONFIG).read_text(encoding="utf-8"))
    return {name: value for name, value in config.items() if not name.startswith("_")}


DIGITS = _digits_config()
TINY_DIGITS = DIGITS | {
    "sample_size": 8,
    "block_out_channels": [16, 16],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
TASKS = {
    "cifar10": Task(NETWORKS["cifar10"], 16, lambda: _random_images(32), schedules.linear()),
    "digits": Task(
        Network("digits model", unet, DIGITS, 1.708, (1, 16, 16)),
        64,
        lambda: _digits(16),
        schedules.cosine(),
        prediction="v",
        clip=1.0,
        trainer=True,
    ),
    "tiny": Task(NETWORKS["tiny"], 2, lambda: _random_images(16), schedules.linear()),
    "tiny-digits": Task(
        Network("tiny digits model", unet, TINY_DIGITS, 0.0728, (1, 8, 8)),
        4,
        lambda: _digits(8),
        schedules.cosine(),
        prediction="v",
        clip=1.0,
        trainer=True,
    ),
}
