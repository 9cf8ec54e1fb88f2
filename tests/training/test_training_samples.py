"""The trainer on signals and videos: steps, checkpoints, samples, and what is refused."""

from __future__ import annotations

import pytest
import torch
from nn.native_unet import LEVELS

import fastdiff
from fastdiff import schedules
from fastdiff.checkpoints import checkpoint
from fastdiff.common.errors import DataError, InputError
from fastdiff.data.datasets import ImageSet
from fastdiff.nn import UNet2DModel
from fastdiff.training.trainer import Trainer, TrainingOptions

SHAPES = {1: (2, 16), 3: (2, 3, 8, 8)}
OPTIONS = TrainingOptions(batch_size=4, steps=4, warmup=1, sample_every=0, save_every=2)
DIMENSIONS = pytest.mark.parametrize("dimensions", [1, 3])


def model_of(dimensions, **options):
    torch.manual_seed(0)
    size = SHAPES[dimensions][1:]
    options = {"sample_size": size if len(size) > 1 else size[0], **options}
    return UNet2DModel(**{**LEVELS, "dimensions": dimensions, **options})


def data_of(dimensions, count=10):
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(count, *SHAPES[dimensions], generator=generator) * 2 - 1
    return ImageSet(samples, dimensions=dimensions)


def trainer_of(dimensions, out=None, options=OPTIONS, **more):
    data = data_of(dimensions)
    return Trainer(model_of(dimensions), schedules.cosine(50), data, options, out=out, **more)


@DIMENSIONS
def test_trained_saved_and_sampled(dimensions, tmp_path):
    trainer = trainer_of(dimensions, tmp_path / "run", validation=data_of(dimensions, 5))
    trainer.run()
    found = checkpoint.load(tmp_path / "run")
    assert found.shape == SHAPES[dimensions]
    for a, b in zip(trainer.checkpoint().model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(a, b)
    sampler = found.diffusion().sampler("ddim", 3)
    images = found.sample(sampler, count=3, progress=False)
    assert images.shape == (3, *SHAPES[dimensions])
    assert images.isfinite().all()
    assert trainer.validation_losses()["validation_loss"] > 0


@DIMENSIONS
def test_resumed(dimensions, tmp_path):
    whole, folder = trainer_of(dimensions), tmp_path / "run"
    losses = [whole.step() for _ in range(4)]
    first = trainer_of(dimensions, folder)
    assert [first.step() for _ in range(2)] == losses[:2]
    first.save()
    again = Trainer.resume(folder, data_of(dimensions))
    assert [again.step() for _ in range(2)] == losses[2:]


@DIMENSIONS
def test_compiled_training_agrees(dimensions):
    """The gradients of the trainer's graph are those of eager mode."""
    losses = {}
    for backend in ("auto", "reference"):
        with fastdiff.backend(backend):
            trainer = trainer_of(dimensions)
            losses[backend] = [trainer.step() for _ in range(3)]
    assert losses["auto"] == pytest.approx(losses["reference"], rel=1e-4)


def test_refused(tmp_path):
    data, forward = data_of(1), schedules.cosine(50)
    with pytest.raises(InputError, match=r"takes samples of \(2, 8\), the data has \(2, 16\)"):
        Trainer(model_of(1, sample_size=8), forward, data)
    with pytest.raises(InputError, match="in_channels 2 and sample_size 8, the data"):
        Trainer(model_of(3, sample_size=8), forward, data_of(3))
    with pytest.raises(
        InputError, match=r"sample of the data has the shape \(2, 16\); set sample_every"
    ):
        Trainer(model_of(1), forward, data, TrainingOptions(sample_every=2), out=tmp_path)
    with pytest.raises(DataError, match=r"shape \[N, C, L\] with N >= 1, got \(2, 3, 8, 8\)"):
        ImageSet(torch.zeros(2, 3, 8, 8), dimensions=1)
    with pytest.raises(DataError, match="dimensions must be 1, 2 or 3, got 4"):
        ImageSet(torch.zeros(2, 3, 8, 8), dimensions=4)
    found = trainer_of(1).checkpoint()
    with pytest.raises(InputError, match="wanted a model of images, got one of dimensions=1"):
        found.image_size  # noqa: B018 - the property raises
