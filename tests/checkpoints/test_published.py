"""Which of OpenAI's published U-Nets can be a UNet2DModel: by their flags, without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from openai_model import OpenAIUNet

from fastdiff.checkpoints.layouts.openai_unet import OPENAI
from fastdiff.common.errors import CheckpointError
from fastdiff.nn import UNet2DModel
from fastdiff.nn.pretrained import NoInitialisation, check_names_and_shapes

# Multipliers of the width at each size of image; no flag of the published models says others.
MULTIPLIERS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}  # fmt: skip
GUIDED = {"width": 256, "layers": 2, "scale_shift": True, "resblock_updown": True}
IMPROVED = {"width": 128, "layers": 3, "scale_shift": True}
SMALL_HEADS = {"num_head_channels": 64}
FOUR_HEADS = {"num_heads": 4}
OLD, NEW = {"use_new_attention_order": False}, {"use_new_attention_order": True}

# Size, sizes with attention, flags of the model, what load is told, and the refusal or "".
PUBLISHED: dict[str, tuple[int, tuple[int, ...], dict[str, Any], dict[str, Any], str]] = {
    "guided 64": (
        64, (32, 16, 8),
        {**GUIDED, **SMALL_HEADS, "width": 192, "layers": 3, "new_order": True, "classes": 1000},
        {**SMALL_HEADS, **NEW}, "",
    ),
    "guided 256": (256, (32, 16, 8), {**GUIDED, **SMALL_HEADS}, {**SMALL_HEADS, **OLD}, ""),
    "guided 128 to 512": (
        512, (32, 16),
        {**GUIDED, **SMALL_HEADS, "width": 192, "channels": 6, "multipliers": MULTIPLIERS[256]},
        {**SMALL_HEADS, **OLD}, "",
    ),
    "guided 512": (
        512, (32, 16, 8), {**GUIDED, **SMALL_HEADS, "classes": 1000}, {**SMALL_HEADS, **OLD},
        "256 sines and cosines, but its first level has 128 channels",
    ),
    "guided 128": (
        128, (32, 16, 8), {**GUIDED, **FOUR_HEADS, "classes": 1000}, {**FOUR_HEADS, **OLD}, "",
    ),
    "guided 64 to 256": (
        256, (32, 16, 8), {**GUIDED, **FOUR_HEADS, "width": 192, "channels": 6},
        {**FOUR_HEADS, **OLD}, "",
    ),
    "improved CIFAR-10": (32, (16, 8), {**IMPROVED, **FOUR_HEADS}, {**FOUR_HEADS, **OLD}, ""),
    "improved LSUN": (
        256, (16,), {**IMPROVED, "layers": 2, "scale_shift": False}, {"num_heads": 1}, "",
    ),
    "improved 64 to 256": (
        256, (16, 8),
        {**IMPROVED, **FOUR_HEADS, "width": 192, "layers": 2, "classes": 1000, "channels": 6},
        {**FOUR_HEADS, **OLD}, "",
    ),
    "improved ImageNet 64": (
        64, (16, 8), {**IMPROVED, **FOUR_HEADS}, {**FOUR_HEADS, **OLD}, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    size, attended, flags, facts, refusal = PUBLISHED[name]
    flags = {"multipliers": MULTIPLIERS[size], "out_channels": 6, **flags}
    levels = [i for i in range(len(flags["multipliers"])) if size >> i in attended]
    with torch.device("meta"), NoInitialisation():
        theirs = OpenAIUNet(attention=levels, **flags).state_dict()
    if refusal:
        with pytest.raises(CheckpointError, match=refusal):
            OPENAI.convert(theirs, facts)
        return
    config, weights = OPENAI.convert(theirs, facts)
    with torch.device("meta"), NoInitialisation():
        ours = UNet2DModel(**config.to_dict())
    check_names_and_shapes(weights, ours.state_dict())
