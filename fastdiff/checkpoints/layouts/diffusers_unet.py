"""A UNet2DModel of diffusers whose config.json is not at hand: its weights alone, in one file.

The tensors tell the levels, the attention, the kind of the embeddings and the channels. They do
not tell the options below, which therefore must be given: each of them has had several values in
published models, and a wrong one changes the output without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.checkpoints.layouts.layout import Layout, State, indices, size
from fastdiff.common.errors import CheckpointError
from fastdiff.nn.config import UNet2DConfig
from fastdiff.nn.pretrained import current_names

_FIRST = "down_blocks.0.resnets.0"
_NAMES = tuple(field.name for field in fields(UNet2DConfig))


def convert(state: State, options: Mapping[str, Any]) -> tuple[UNet2DConfig, dict[str, Tensor]]:
    """Configuration and weights of a U-Net; CheckpointError for another network of diffusers'."""
    if any("transformer_blocks" in name or "skip_conv" in name for name in state):
        kind = "UNet2DConditionModel" if any("attn2" in n for n in state) else "UNet2DModel"
        raise CheckpointError(
            f"is a {kind} of diffusers with blocks that fastdiff.nn.UNet2DModel has not: "
            "load it with diffusers and pass it to fastdiff's samplers or compiler"
        )
    try:
        tensors = current_names(state, Path("it"))
        told = _told(tensors)
        missing = [name for name in _untold(told) if name not in options]
        if missing:
            raise CheckpointError(
                f"has no config.json beside it, and its tensors do not tell {', '.join(missing)}: "
                "put config.json into its folder, or give each as an option, with the names and "
                "meanings of fastdiff.nn.UNet2DConfig"
            )
        for name in set(told) & set(options):
            given = options[name]
            if told[name] != (tuple(given) if isinstance(given, list) else given):
                raise CheckpointError(f"has {name} {told[name]!r} by its tensors, not {given!r}")
        return UNet2DConfig.from_dict({**options, **told}), tensors
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _told(state: State) -> dict[str, Any]:
    """The options that the tensors tell."""
    downs = [f"down_blocks.{level}" for level in indices(state, r"down_blocks\.(\d+)\.resnets\.")]
    widths = [size(state, f"{block}.resnets.0.conv1.weight", 0) for block in downs]
    by_resnet = any(f"{block}.downsamplers.0.conv1.weight" in state for block in downs)
    attention = [f"{block}.attentions.0.to_q.weight" in state for block in downs]
    plain = "ResnetDownsampleBlock2D" if by_resnet else "DownBlock2D"
    down = tuple("AttnDownBlock2D" if has else plain for has in attention)
    resampling = "resnet" if by_resnet else "conv"
    doubled = size(state, f"{_FIRST}.time_emb_proj.weight", 0) == 2 * widths[0]
    told: dict[str, Any] = {
        "in_channels": size(state, "conv_in.weight", 1),
        "out_channels": size(state, "conv_out.weight", 0),
        "block_out_channels": tuple(widths),
        "layers_per_block": len(indices(state, r"down_blocks\.0\.resnets\.(\d+)\.")),
        "down_block_types": down,
        "up_block_types": tuple(
            kind.replace("Downsample", "Upsample").replace("Down", "Up") for kind in down[::-1]
        ),
        "downsample_type": resampling,
        "upsample_type": resampling,
        "time_embedding_dim": size(state, "time_embedding.linear_1.weight", 0),
        "resnet_time_scale_shift": "scale_shift" if doubled else "default",
    }
    return told | _told_of_middle(state) | _told_of_embeddings(state)


def _told_of_middle(state: State) -> dict[str, Any]:
    if "mid_block.resnets.0.conv1.weight" not in state:
        return {"mid_block_type": None, "attn_norm_num_groups": None}
    told: dict[str, Any] = {"add_attention": "mid_block.attentions.0.to_q.weight" in state}
    if "mid_block.attentions.0.group_norm.weight" not in state:
        told["attn_norm_num_groups"] = None
    return told


def _told_of_embeddings(state: State) -> dict[str, Any]:
    told: dict[str, Any] = {"time_embedding_type": "positional"}
    features = state.get("time_proj.weight")
    if features is not None and features.ndim == 1:
        told["time_embedding_type"] = "fourier"
    elif features is not None:
        told["time_embedding_type"] = "learned"
        told["num_train_timesteps"] = size(state, "time_proj.weight", 0)
    if "class_embedding.weight" in state:
        told["num_class_embeds"] = size(state, "class_embedding.weight", 0)
    elif "class_embedding.linear_1.weight" in state:
        told["class_embed_type"] = "timestep"
    return told


def _untold(told: Mapping[str, Any]) -> list[str]:
    """The options that must be given, for a model of which the tensors tell so much."""
    names = ["norm_num_groups", "norm_eps"]
    if any("Attn" in kind for kind in told["down_block_types"]) or told.get("add_attention"):
        names.append("attention_head_dim")
    if told["resnet_time_scale_shift"] == "scale_shift" and "attn_norm_num_groups" not in told:
        names.append("attn_norm_num_groups")
    if told["time_embedding_type"] == "positional":
        names += ["flip_sin_to_cos", "freq_shift"]
    if told["downsample_type"] == "conv" and len(told["block_out_channels"]) > 1:
        names.append("downsample_padding")
    return names


DIFFUSERS = Layout(
    "a diffusers UNet2DModel without its config.json",
    ("conv_in.weight", "time_embedding.linear_1.weight", f"{_FIRST}.conv1.weight"),
    convert,
    {name: (object, "as in fastdiff.nn.UNet2DConfig, which checks it") for name in _NAMES},
)
