"""Training options and the U-Net made for the images."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.common.errors import CheckpointError, InputError
from fastdiff.nn.image_unet import make_unet
from fastdiff.training.training_options import TrainingOptions, recorded_options

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"steps": 0}, "steps must be at least 1, got 0", id="steps"),
        pytest.param({"batch_size": 0}, "batch_size", id="batch size"),
        pytest.param({"save_every": 0}, "save_every", id="save_every"),
        pytest.param({"keep": 0}, "keep", id="keep"),
        pytest.param({"warmup": -1}, "warmup must not be negative", id="warmup"),
        pytest.param({"sample_every": -1}, "sample_every", id="sample_every"),
        pytest.param({"weight_decay": -0.1}, "weight_decay", id="weight decay"),
        pytest.param({"grad_clip": math.inf}, "grad_clip", id="grad_clip"),
        pytest.param({"seed": -1}, "seed", id="seed"),
        pytest.param({"lr": 0.0}, "lr must be positive", id="lr"),
        pytest.param({"lr": math.nan}, "lr must be positive, got nan", id="lr NaN"),
        pytest.param({"ema": 1.0}, r"ema must lie in \[0, 1\)", id="ema"),
        pytest.param({"lr_schedule": "step"}, "unknown lr_schedule 'step'", id="lr_schedule"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(InputError, match=message):
        TrainingOptions(**changes)


def test_the_default_unet_fits_the_digits():
    model = make_unet(16, 1, 10)
    assert model.config.sample_size == 16
    assert model.config.num_class_embeds == 10
    assert model.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    assert model.config.up_block_types == ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    out = model(torch.zeros(1, 1, 16, 16), torch.tensor([3]), torch.tensor([9]))
    assert out.shape == (1, 1, 16, 16)
    assert make_unet(8, widths=(8,), attention=()).config.num_class_embeds is None


def test_the_weights_are_drawn_from_the_global_generator():
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        weights.append(make_unet(8, widths=(8,), attention=()).conv_in.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: make_unet(10), "divisible by 4, got 10", id="odd size"),
        pytest.param(lambda: make_unet(0), "numbers from 1, got 0", id="no size"),
        pytest.param(lambda: make_unet(8, widths=()), "must be positive", id="no levels"),
        pytest.param(lambda: make_unet(8, widths=(8, 0)), "must be positive", id="no width"),
        pytest.param(lambda: make_unet(8, layers_per_block=0), "positive", id="no layers"),
        pytest.param(
            lambda: make_unet(8, widths=(8, 8), attention=(2,)), "level 2 .* 0..1", id="attention"
        ),
        pytest.param(lambda: make_unet(8, dropout=1.0), r"dropout must lie in \[0, 1\)", id="drop"),
    ],
)
def test_bad_models(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(None, id="none"),
        pytest.param({"steps": 3, "momentum": 0.9}, id="unknown"),
        pytest.param({"steps": "three"}, id="a word"),
        pytest.param({"steps": 0}, id="out of range"),
    ],
)
def test_unusable_recorded_options(options, tmp_path):
    with pytest.raises(CheckpointError, match=r"training\.json: unusable options"):
        recorded_options({"options": options}, tmp_path)
