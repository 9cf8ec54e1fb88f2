"""Training and sampling on the digits, fastdiff's operations against plain PyTorch's.

Only the backend differs; the model, the data and all other code are the same. The ratios are for a
whole model, its convolutions included.
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
        notes=lambda comparison: {"steps/s": f"{1 / comparison.ours:.2f}"},
    )


@pytest.mark.parametrize("batch", [10, 80])
def bench_sampling(versus, batch) -> None:
    digits = checkpoint.load("digits")
    sampler = samplers.DDIM(digits.forward, 10, prediction=digits.prediction)
    labels = [i % 10 for i in range(batch)]

    def generate():
        return digits.sample(
            sampler, labels=labels, generator=torch.Generator().manual_seed(0), progress=False
        )

    torch.testing.assert_close(generate(), on_reference(generate)(), atol=1e-3, rtol=0)
    versus(
        generate,
        {"reference": on_reference(generate)},
        seconds=20,
        notes=lambda comparison: {"images/s": f"{batch / comparison.ours:.1f}"},
    )
