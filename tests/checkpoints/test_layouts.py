"""Tables of names against module trees in the manner of the programs: outputs agree to 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ddpm_models import DdimUNet, ScoreSdeUNet
from openai_model import OpenAIUNet, randomized
from torch import Tensor, nn

import fastdiff
from fastdiff.common.errors import CheckpointError
from fastdiff.nn import UNet2DModel

OLD_ORDER = {"use_new_attention_order": False}
# For each case the options of the model, and those that its weights do not tell.
OPENAI: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"num_heads": 1}),
    "scale and shift": ({"scale_shift": True}, {"num_heads": 1}),
    "learned variance": ({"out_channels": 6}, {"num_heads": 1}),
    "resampling blocks": ({"resblock_updown": True, "scale_shift": True}, {"num_heads": 1}),
    "resampling blocks with attention": (
        {"resblock_updown": True, "attention": (0, 1)},
        {"num_heads": 1},
    ),
    "labels": ({"classes": 5}, {"num_heads": 1}),
    "channels of a head, old order": (
        {"num_head_channels": 16, "attention": (0, 1)},
        {"num_head_channels": 16, **OLD_ORDER},
    ),
    "channels of a head, new order": (
        {"num_head_channels": 16, "new_order": True},
        {"num_head_channels": 16, "use_new_attention_order": True},
    ),
    "heads": ({"num_heads": 4}, {"num_heads": 4, **OLD_ORDER}),
    "attention in the middle alone": (
        {"attention": (), "num_heads": 4},
        {"num_heads": 4, **OLD_ORDER},
    ),
    "three levels, two blocks": (
        {"multipliers": (1, 2, 2), "layers": 2, "attention": (1, 2), "num_heads": 2},
        {"num_heads": 2, **OLD_ORDER},
    ),
    "heads of two widths": (
        {"multipliers": (1, 2, 3), "layers": 2, "attention": (0, 2), "num_heads": 4},
        {"num_heads": 4, **OLD_ORDER},
    ),
    "one level": ({"width": 64, "multipliers": (1,), "attention": ()}, {"num_heads": 1}),
    "grey images": ({"channels": 1, "out_channels": 1}, {"num_heads": 1}),
    "all": (
        {
            "multipliers": (1, 2, 3), "layers": 2, "attention": (1, 2), "num_head_channels": 32,
            "new_order": True, "scale_shift": True, "resblock_updown": True, "classes": 10,
            "out_channels": 6,
        },
        {"num_head_channels": 32, "use_new_attention_order": True, "image_size": 8},
    ),
}  # fmt: skip


def saved(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def assert_agree(theirs: nn.Module, ours: UNet2DModel, labels: Tensor | None = None) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, ours.config.in_channels, 8, 8, generator=generator)
    t = torch.tensor([3, 871])
    with torch.no_grad():
        wanted = theirs(x, t) if labels is None else theirs(x, t, labels)
        got = ours(x, t, labels)
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", OPENAI)
def test_openai(case: str, tmp_path: Path) -> None:
    shape, options = OPENAI[case]
    theirs = randomized(OpenAIUNet(**shape))
    ours = fastdiff.load(saved(theirs, tmp_path), **options)
    assert not ours.training
    assert ours.config.sample_size == options.get("image_size")
    labels = torch.tensor([1, 4]) if "classes" in shape else None
    assert_agree(theirs, ours, labels)


def test_heads_of_two_widths_are_written_and_read(tmp_path: Path) -> None:
    shape, options = OPENAI["heads of two widths"]
    ours = fastdiff.load(saved(randomized(OpenAIUNet(**shape)), tmp_path), **options)
    assert ours.config.attention_head_dim == (8, 16, 24)
    ours.save_pretrained(tmp_path / "folder")
    again = UNet2DModel.from_pretrained(tmp_path / "folder")
    assert again.config == ours.config
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([3])
    with torch.no_grad():
        assert torch.equal(again(x, t), ours(x, t))


def test_openai_is_also_diffusers(tmp_path: Path) -> None:
    """The configuration that was derived says the same to diffusers."""
    diffusers = pytest.importorskip("diffusers")
    shape, options = OPENAI["all"]
    ours = fastdiff.load(saved(randomized(OpenAIUNet(**shape)), tmp_path), **options)
    ours.save_pretrained(tmp_path / "folder")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "folder").eval()
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3, 871]), torch.tensor([0, 9])
    with torch.no_grad():
        wanted = theirs(x, t, class_labels=labels).sample
        torch.testing.assert_close(ours(x, t, labels), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [DdimUNet, ScoreSdeUNet])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"layers": 1, "attention": ()},
        {"multipliers": (1, 2, 2), "attention": (0, 2)},
        # In groups of one channel, as at a width of 32, a norm removes the time embedding.
        {"width": 64, "multipliers": (1,), "attention": (0,)},
    ],
    ids=["two levels", "no attention", "three levels", "one level"],
)
def test_ddpm(kind: type[nn.Module], shape: dict[str, Any], tmp_path: Path) -> None:
    theirs = randomized(kind(**shape))
    sde = {"centered": True, "scale_by_sigma": False} if kind is ScoreSdeUNet else {}
    assert_agree(theirs, fastdiff.load(saved(theirs, tmp_path), **sde))


def test_images_that_are_not_centred(tmp_path: Path) -> None:
    theirs = randomized(ScoreSdeUNet(centered=False))
    ours = fastdiff.load(saved(theirs, tmp_path), centered=False, scale_by_sigma=False)
    assert ours.config.center_input_sample
    assert_agree(theirs, ours)


# What the weights do not tell, and what no UNet2DModel can be.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no heads": ({}, {}, "needs the number of heads of its attention.*num_head_channels=...,"),
    "both heads": (
        {},
        {"num_heads": 2, "num_head_channels": 16},
        "got num_heads and num_head_channels",
    ),
    "no order": ({}, {"num_heads": 2}, "needs the order of queries.*use_new_attention_order="),
    "heads that do not divide": (
        {},
        {"num_heads": 3, **OLD_ORDER},
        "attention over 64 channels, which num_heads=3 does not divide",
    ),
    "no heads at all": (
        {},
        {"num_heads": 0, **OLD_ORDER},
        "attention over 64 channels, which num_heads=0 does not divide",
    ),
    "narrow first level": (
        {"width": 64, "multipliers": (0.5, 1)},
        {"num_heads": 1},
        "64 sines and cosines, but its first level has 32 channels",
    ),
    "resampling without weights": (
        {"conv_resample": False},
        {"num_heads": 1},
        "wanted the same number of residual blocks|conv_resample=False",
    ),
    "unknown option": (
        {},
        {"heads": 1},
        "takes no option 'heads'; its options are image_size, num_heads",
    ),
    "option of a wrong type": ({}, {"num_heads": True}, "needs num_heads to be int, got True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    shape, options, message = REFUSED[case]
    path = saved(OpenAIUNet(**shape), tmp_path)
    with pytest.raises(CheckpointError, match=message) as refused:
        fastdiff.load(path, **options)
    assert str(refused.value).startswith(f"{path}, of improved-diffusion or guided-diffusion, ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "does not tell centered: say centered=True or False, as config.data.centered"),
        ({"centered": True}, "does not tell scale_by_sigma"),
        ({"centered": True, "scale_by_sigma": True}, r"divides its output by sigma"),
    ],
)
def test_score_sde_needs_facts(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        fastdiff.load(saved(ScoreSdeUNet(), tmp_path), **options)


def spoilt(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    """Weights of an ``OpenAIUNet`` with one thing wrong."""
    tensors = dict(tensors)
    if how == "missing":
        del tensors["input_blocks.1.0.out_layers.3.bias"]
    elif how == "additional":
        tensors["input_blocks.1.0.surprise"] = torch.zeros(1)
    elif how == "shape":
        tensors["out.0.weight"] = torch.zeros(31)
    elif how == "qkv":
        tensors["middle_block.1.qkv.weight"] = torch.zeros(100, 64, 1)
    elif how == "dimensions":
        tensors["input_blocks.1.0.emb_layers.1.weight"] = torch.zeros(())
    elif how == "kernel":
        tensors["middle_block.1.qkv.weight"] = torch.zeros(192, 64, 3)
    elif how == "integers":
        tensors["out.0.weight"] = torch.zeros(32, dtype=torch.int64)
    elif how == "nan":
        tensors["out.0.weight"] = torch.full((32,), torch.nan)
    elif how == "gap":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("output_blocks.1.")}
    elif how == "classifier":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("output_blocks.")}
    elif how == "text":
        tensors["input_blocks.4.1.transformer_blocks.0.attn2.to_q.weight"] = torch.zeros(1)
    return tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "has no input_blocks.1.0.out_layers.3.bias, which this layout needs"),
        ("additional", "has the tensor input_blocks.1.0.surprise, which this layout does not"),
        ("shape", r"conv_norm_out.weight must have shape \(32,\), got \(31,\)"),
        ("qkv", r"middle_block.1.qkv of shape \(100, 64\), wanted 3 times 64"),
        ("dimensions", r"emb_layers.1.weight of shape \(\), which has too few dimensions"),
        ("kernel", r"projection of shape \(192, 64, 3\), wanted a convolution of size 1"),
        ("integers", "conv_norm_out.weight must be floating point, got torch.int64"),
        ("nan", "conv_norm_out.weight has NaN or infinity"),
        ("gap", "wanted the same number of residual blocks in each level"),
        ("classifier", "is a classifier of guided-diffusion"),
        ("text", "attention to a text.*from_single_file"),
    ],
)
def test_spoilt_weights(how: str, message: str, tmp_path: Path) -> None:
    tensors = spoilt(randomized(OpenAIUNet()).state_dict(), how)
    torch.save(tensors, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=message):
        fastdiff.load(tmp_path / "weights.pt", num_heads=1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["init_conv.weight", "time_mlp.1.weight", "time_mlp.3.weight", "final_conv.weight",
             "downs.0.0.block1.norm.g", "downs.0.2.mem_kv", "downs.0.2.to_out.1.g"],
            "lucidrains.*7x7.*root mean square.*learned keys and values.*linear in the.*GELU",
        ),
        (["model.map_layer0.weight", "model.map_layer1.weight"], "EDM, cannot be a UNet2DModel"),
        (["unet.emb_fourier.freqs", "unet.emb_noise.weight"], "preserve magnitudes"),
        (["x_embedder.proj.weight", "t_embedder.mlp.0.weight"], "a transformer of patches"),
        (
            ["all_modules.0.W", "all_modules.1.weight", "all_modules.2.weight",
             "all_modules.5.Conv_2.weight"],
            r"DDPM\+\+ or NCSN\+\+.*convolution in the shortcut.*sqrt\(2\).*random features",
        ),
        (
            ["temb.dense.0.weight", "conv_in.weight", "mid.block_1.norm1.weight"],
            r"DDPM in PyTorch.*has no conv_out\.weight, which this layout needs",
        ),
        (["encoder.weight", "decoder.weight"], r"unknown network \(encoder.weight, decoder"),
    ],
    ids=["lucidrains", "EDM", "EDM2", "DiT", "NCSN++", "ddim without levels", "unknown"],
)  # fmt: skip
def test_other_networks(names: list[str], message: str, tmp_path: Path) -> None:
    torch.save({name: torch.zeros(4, 4, 1, 1) for name in names}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=message):
        fastdiff.load(tmp_path / "weights.pt")
