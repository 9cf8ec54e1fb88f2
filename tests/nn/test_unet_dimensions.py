"""Models of signals and videos: values and gradients by conv1d and conv3d, and what is theirs."""

from __future__ import annotations

import json

import pytest
import torch
from nn.native_unet import LEVELS, TIMES, Native, sample, unet

from fastdiff.common.errors import InputError
from fastdiff.nn import FrameAttention, UNet2DModel
from fastdiff.nn.config import UNet2DConfig
from fastdiff.nn.image_unet import make_unet


@pytest.mark.parametrize("dimensions", [1, 3])
def test_values_and_gradients_are_those_of_native_convolutions(dimensions):
    model, x = unet(dimensions).double(), sample(dimensions).double()
    weights = dict(model.named_parameters())
    x.requires_grad_()
    found, expected = model(x, TIMES), Native(model, weights)(x, TIMES)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, [x, *weights.values()], direction),
        torch.autograd.grad(expected, [x, *weights.values()], direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"downsample_padding": 0},
        {"resnet_time_scale_shift": "scale_shift"},
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
        {"time_embedding_type": "fourier"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("dimensions", [1, 3])
def test_every_option_runs(dimensions, options):
    model, x = unet(dimensions, **options), sample(dimensions)
    found = model(x, TIMES)
    assert found.shape == x.shape
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1], TIMES[i]), found[i : i + 1])
    rows = model.precompute(TIMES[:1]).at(0)
    torch.testing.assert_close(
        model(x, TIMES[0], precomputed=rows), model(x, TIMES[0]), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_a_signal_is_no_image_with_more_rows():
    """Two signals that are the rows of one image do not see each other."""
    model = unet(1)
    x = sample(1)
    changed = torch.cat([x[:1], x[1:] + 1])
    torch.testing.assert_close(model(changed, 5)[:1], model(x, 5)[:1], rtol=0, atol=0)


@torch.no_grad()
def test_a_video_begins_as_the_images_of_a_model_of_images():
    torch.manual_seed(0)
    images, videos = (UNet2DModel(**{**LEVELS, "dimensions": d}).eval() for d in (2, 3))
    missing, unexpected = videos.load_state_dict(images.state_dict(), strict=False)
    assert missing
    assert all("frame_attentions" in name for name in missing)
    assert not unexpected
    x = sample(3)
    found = videos(x, TIMES)
    for i, frame in enumerate(x.unbind(2)):
        torch.testing.assert_close(found[:, :, i], images(frame, TIMES), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_frames_see_each_other_in_their_order(frames):
    model = unet(3)
    x = torch.randn(1, 2, frames, 8, 8)
    found = model(x, 5)
    assert found.shape == x.shape
    if frames > 1:
        changed = x.clone()
        changed[:, :, -1] += 1
        assert (model(changed, 5)[:, :, 0] - found[:, :, 0]).abs().max() > 1e-4
        assert (model(x.flip(2), 5).flip(2) - found).abs().max() > 1e-4


@pytest.mark.parametrize("dimensions", [1, 3])
def test_empty_batch(dimensions):
    x = sample(dimensions)[:0]
    assert unet(dimensions)(x, 5).shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("dimensions", [1, 3])
def test_saved_and_read(dimensions, tmp_path):
    model = unet(dimensions)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dimensions"] == dimensions
    again, x = UNet2DModel.from_pretrained(tmp_path), sample(dimensions)
    assert torch.equal(again(x, TIMES), model(x, TIMES))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_checkpointing_changes_no_gradient(dimensions):
    model, x = unet(dimensions), sample(dimensions)
    plain = torch.autograd.grad(model(x, TIMES).square().mean(), list(model.parameters()))
    model.enable_gradient_checkpointing()
    again = torch.autograd.grad(model(x, TIMES).square().mean(), list(model.parameters()))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16,), (8, 12), (3, 8, 8)], ids=str)
def test_made_of_a_size(size):
    model = make_unet(size, 2, widths=(8, 16), layers_per_block=1, attention=(1,))
    assert model.config.dimensions == len(size)
    assert model.sample_shape == (2, *size)
    assert model(torch.zeros(1, 2, *size), 5).shape == (1, 2, *size)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((), r"one to three numbers from 1, got \(\)"),
        ((2, 2, 2, 2), "one to three numbers"),
        ((0,), r"from 1, got \(0,\)"),
        ((6,), r"divisible by 4, got \(6,\)"),
        ((3, 8, 6), r"divisible by 4, got \(3, 8, 6\)"),
    ],
    ids=str,
)
def test_made_of_a_wrong_size(size, text):
    with pytest.raises(InputError, match=text):
        make_unet(size)


def test_the_format_of_models_of_images_is_unchanged():
    assert "dimensions" not in UNet2DConfig().to_dict()
    model = UNet2DModel(**{**LEVELS, "dimensions": 2})
    assert not any("frame" in name for name in model.state_dict())
    assert not any(isinstance(part, FrameAttention) for part in model.modules())


@pytest.mark.parametrize(
    ("dimensions", "shape", "text"),
    [
        (1, (1, 2, 8, 8), r"sample must be \[N, 2, L\], got \(1, 2, 8, 8\)"),
        (1, (1, 2, 7), "2 levels need length divisible by 2, got 7"),
        (3, (1, 2, 8, 8), r"sample must be \[N, 2, F, H, W\], got \(1, 2, 8, 8\)"),
        (3, (1, 2, 3, 8, 7), "2 levels need height and width divisible by 2, got 3 x 8 x 7"),
        (3, (1, 2, 0, 8, 8), "2 levels need height and width .*, got 0 x 8 x 8"),
    ],
)
def test_wrong_samples(dimensions, shape, text):
    with pytest.raises(ValueError, match=text):
        unet(dimensions)(torch.zeros(shape), 5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dimensions": 4}, "unsupported dimensions 4, supported are 1, 2, 3"),
        ({"dimensions": 1, "sample_size": (8, 8)}, r"one number, or 1 .* got \(8, 8\)"),
        ({"dimensions": 3, "sample_size": (8, 8)}, r"one number, or 3 .* got \(8, 8\)"),
        (
            {
                "dimensions": 3,
                "down_block_types": ("DownBlock2D",) * 2,
                "up_block_types": ("UpBlock2D",) * 2,
                "add_attention": False,
            },
            "a model of videos needs a level with attention",
        ),
    ],
    ids=["four", "signal-of-two", "video-of-two", "no-attention"],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=text):
        UNet2DModel(**{**LEVELS, **options})
