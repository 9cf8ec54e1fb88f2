from __future__ import annotations

import pytest
import torch
from unet_cases import CASES, TINY

from fastdiff.nn import UNet2DConfig, UNet2DModel

LEVELS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sample_sizes": 3, "widths": 1}, "no option sample_sizes, widths"),
        ({"in_channels": "3"}, "in_channels must be int, got '3'"),
        ({"in_channels": True}, "in_channels must be int, got True"),
        ({"in_channels": 0}, "in_channels must be positive, got 0"),
        ({"sample_size": (8, 8, 8)}, "sample_size must be .*, got \\(8, 8, 8\\)"),
        ({"sample_size": -1}, "sample_size must be positive"),
        ({"layers_per_block": 0}, "layers_per_block must be positive"),
        ({"norm_num_groups": None}, "norm_num_groups must be int, got None"),
        ({"norm_eps": float("inf")}, "norm_eps must be positive, got inf"),
        ({"norm_eps": float("nan")}, "norm_eps must be positive, got nan"),
        ({"dropout": 1.0}, "dropout must lie in \\[0, 1\\), got 1.0"),
        ({"num_class_embeds": 0}, "num_class_embeds must be positive"),
        ({"act_fn": "mish"}, "unsupported act_fn 'mish', supported are 'silu', 'swish'"),
        ({"time_embedding_type": "x"}, "unsupported time_embedding_type 'x'"),
        ({"resnet_time_scale_shift": "spatial"}, "unsupported resnet_time_scale_shift 'spatial'"),
        ({"downsample_type": "fir"}, "unsupported downsample_type 'fir'"),
        ({"upsample_type": "fir"}, "unsupported upsample_type 'fir'"),
        ({"downsample_padding": 2}, "unsupported downsample_padding 2, supported are 0, 1"),
        ({"class_embed_type": "projection"}, "unsupported class_embed_type 'projection'"),
        ({"mid_block_type": "UNetMidBlock3D"}, "unsupported mid_block_type 'UNetMidBlock3D'"),
        (
            {"down_block_types": ("SkipDownBlock2D", "DownBlock2D")},
            "unsupported down_block_types 'SkipDownBlock2D', supported are 'DownBlock2D', ",
        ),
        (
            {"up_block_types": ("UpBlock2D", "DownBlock2D")},
            "unsupported up_block_types 'DownBlock2D', supported are 'UpBlock2D', ",
        ),
        ({"down_block_types": ("DownBlock2D",)}, "one block for each of the 2 .* got 1"),
        ({"up_block_types": "UpBlock2D"}, "up_block_types must be tuple\\[str, \\.\\.\\.\\], got"),
        (
            {"block_out_channels": (), "down_block_types": (), "up_block_types": ()},
            "one block for each of the 0",
        ),
        ({"norm_num_groups": 3}, "norm_num_groups must divide .* got 3 groups for 8 channels"),
        ({"attn_norm_num_groups": 3}, "attn_norm_num_groups must divide .* 3 groups for 16"),
        ({"attention_head_dim": 17}, "attention_head_dim must not exceed .* got 17 for 16"),
        ({"attention_head_dim": (8,)}, "one for each of the 2 .* got \\(8,\\)"),
        ({"freq_shift": 4}, "freq_shift must be below half .*, 4, got 4"),
        ({"time_embedding_type": "learned"}, "'learned' needs num_train_timesteps, got None"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options(options, text):
    with pytest.raises(ValueError, match=text):
        UNet2DModel(**{**TINY, **options})


def test_attention_head_dim_is_free_without_attention():
    UNet2DModel(**{**TINY, **LEVELS, "add_attention": False, "attention_head_dim": 17})
    UNet2DModel(**{**TINY, **LEVELS, "mid_block_type": None, "attention_head_dim": 17})


def test_config_ignores_private_keys_and_takes_lists():
    config = UNet2DConfig.from_dict({"_class_name": "x", "_name_or_path": 1, "sample_size": [8, 4]})
    assert config.sample_size == (8, 4)
    assert UNet2DConfig.from_dict(config.to_dict()) == config


X = torch.zeros(2, 3, 8, 8)
# Two residual blocks of 8 and 16 channels on the way down, two of 16 in the middle, and four up.
WIDTH = 8 + 16 + 2 * 16 + 2 * 16 + 2 * 8


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (torch.zeros(3, 8, 8), "sample must be \\[N, 3, H, W\\], got \\(3, 8, 8\\)"),
        (torch.zeros(2, 1, 8, 8), "sample must be \\[N, 3, H, W\\], got \\(2, 1, 8, 8\\)"),
        (torch.zeros(2, 3, 8, 7), "2 levels need height and width divisible by 2, got 8 x 7"),
        (torch.zeros(2, 3, 0, 8), "divisible by 2, got 0 x 8"),
    ],
    ids=["3-d", "channels", "odd", "empty"],
)
def test_sample(sample, text):
    with pytest.raises(ValueError, match=text):
        UNet2DModel(**TINY)(sample, 0)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("tiny", {}, "timestep must be given, or precomputed in its place, got None"),
        ("tiny", {"timestep": torch.zeros(3)}, "must have 1 element or 2, .* got \\(3,\\)"),
        ("tiny", {"timestep": torch.zeros(1, 2)}, "must have shape \\[\\] or \\[N\\], got \\(1, 2"),
        (
            "tiny",
            {"precomputed": torch.zeros(3, WIDTH)},
            "\\(2, 104\\) or \\(1, 104\\), got \\(3, 104",
        ),
        (
            "tiny",
            {"precomputed": torch.zeros(2, 8)},
            "precomputed must have shape .* got \\(2, 8\\)",
        ),
        ("tiny", {"precomputed": torch.zeros(WIDTH)}, "must have shape .* got \\(104,\\)"),
        (
            "scale-shift",
            {"precomputed": torch.zeros(2, WIDTH)},
            "\\(2, 208\\) or \\(1, 208\\), got",
        ),
        ("fourier", {"precomputed": torch.zeros(2, WIDTH)}, "divides its output by timestep"),
        ("learned", {"timestep": 0.5}, "timestep must be int64, got torch.float32"),
        ("tiny", {"timestep": 1, "class_labels": torch.zeros(2).long()}, "is unconditional"),
        ("classes", {"timestep": 1}, "is class-conditional"),
        ("classes", {"timestep": 1, "class_labels": torch.zeros(3).long()}, "shape \\(2,\\), got"),
        ("classes", {"timestep": 1, "class_labels": torch.zeros(2, 1).long()}, "shape \\(2,\\)"),
        ("classes", {"timestep": 1, "class_labels": torch.zeros(2)}, "must be int64, got"),
        ("classes", {"timestep": 1, "class_labels": torch.ones(2).bool()}, "must be int64, got"),
        ("class-timestep", {"timestep": 1, "class_labels": torch.ones(1)}, "shape \\(2,\\), got"),
        ("class-identity", {"timestep": 1, "class_labels": torch.ones(2)}, "shape \\(2, 32\\)"),
        (
            "class-identity",
            {"timestep": 1, "class_labels": torch.ones(2, 32).long()},
            "floating point, got torch.int64",
        ),
        (
            "classes",
            {"precomputed": torch.zeros(2, WIDTH), "class_labels": torch.zeros(2).long()},
            "class_labels must be None beside precomputed",
        ),
    ],
)
def test_conditioning(name, arguments, text):
    with pytest.raises(ValueError, match=text):
        UNet2DModel(**CASES[name])(X, **arguments)


def test_precomputed_is_one_step():
    model = UNet2DModel(**TINY)
    with pytest.raises(
        TypeError, match=r"a tensor, the result of precompute.*at\(step\), got Precomputed"
    ):
        model(X, precomputed=model.precompute(3))


@pytest.mark.parametrize(
    ("name", "arguments", "error", "text"),
    [
        (
            "tiny",
            (torch.zeros(1, 2),),
            ValueError,
            "must have shape \\[\\] or \\[N\\], got \\(1, 2",
        ),
        ("tiny", (1, torch.zeros(2).long(), 2), ValueError, "is unconditional"),
        ("learned", (0.5,), ValueError, "timestep must be int64, got torch.float32"),
        ("learned", (torch.tensor([0, 1000]),), IndexError, "timestep must lie in 0\\.\\.999"),
        ("classes", (1,), ValueError, "is class-conditional"),
        ("classes", (1, torch.zeros(3).long(), 2), ValueError, "shape \\(2,\\), got \\(3,\\)"),
        ("classes", (1, torch.tensor([0, 10]), 2), IndexError, "class_labels must lie in 0\\.\\.9"),
    ],
)
def test_precompute(name, arguments, error, text):
    with pytest.raises(error, match=text):
        UNet2DModel(**CASES[name]).precompute(*arguments)


@pytest.mark.parametrize("labels", [(0, 10), (-1, 0)], ids=str)
def test_labels_out_of_range(labels):
    with pytest.raises(IndexError, match=r"class_labels must lie in 0\.\.9, got values from"):
        UNet2DModel(**CASES["classes"])(X, 0, torch.tensor(labels))


@pytest.mark.parametrize("timestep", [1000, -1])
def test_learned_timesteps_out_of_range(timestep):
    with pytest.raises(IndexError, match=r"timestep must lie in 0\.\.999, got values from"):
        UNet2DModel(**CASES["learned"])(X, timestep)
