"""Training and sampling on the digits, fastdiff's operations against plain PyTorch's.

The model, the data and every other line of code are the same; only the backend differs. So these
ratios say what the four operations are worth inside a real model, convolutions included.
"""

from __future__ import annotations

import pytest
import torch
from comparison import on_reference

from fastdiff import data, samplers, schedules
from fastdiff.checkpoints import checkpoint
from fastdiff.nn.image_unet import make_unet
from fastdiff.training.trainer import Trainer, TrainingOptions


def bench_training_step(versus) -> None:
    digits = data.digits("train", 16)
    torch.manual_seed(0)
    model = make_unet(digits.size, digits.channels, len(digits.classes))
    trainer = Trainer(model, schedules.cosine(), digits, TrainingOptions(), prediction="v")
    versus(
        trainer.step,
        {"reference": on_reference(trainer.step)},
        seconds=20,
        notes=lambda found: {"steps/s": f"{1 / found.ours:.2f}"},
    )


@pytest.mark.parametrize("batch", [10, 80])
def bench_sampling(versus, batch) -> None:
    digits = checkpoint.load("digits")
    sampler = samplers.DDIM(digits.forward, 10, prediction=digits.prediction)
    labels = [i % 10 for i in range(batch)]

    def draw():
        return digits.sample(
            sampler, labels=labels, generator=torch.Generator().manual_seed(0), progress=False
        )

    torch.testing.assert_close(draw(), on_reference(draw)(), atol=1e-3, rtol=0)
    versus(
        draw,
        {"reference": on_reference(draw)},
        seconds=20,
        notes=lambda found: {"images/s": f"{batch / found.ours:.1f}"},
    )
