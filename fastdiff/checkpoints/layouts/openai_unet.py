"""The U-Net of improved-diffusion and guided-diffusion (arXiv:2102.09672, arXiv:2105.05233).

Latent diffusion's U-Net without text has this layout too. Blocks are numbered in the order of the
calls: input_blocks.0 is the first convolution, input_blocks.N.0 a residual block or a resampling,
input_blocks.N.1 its attention; output_blocks.N.1 or .2 also the resampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fastdiff.checkpoints.layouts.layout import (
    Layout,
    Part,
    Renaming,
    State,
    Table,
    as_linear,
    indices,
    make_config,
    parts,
    size,
)
from fastdiff.common.errors import CheckpointError
from fastdiff.nn.config import UNet2DConfig

_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
)
_SHORTCUT = ("skip_connection", "conv_shortcut")
_LAYERS: Table = {
    "resnet": _RESNET,
    "down_resnet": _RESNET,
    "up_resnet": _RESNET,
    "down_conv": (("op", "conv"),),
    "up_conv": (("conv", "conv"),),
    "attention": (("norm", "group_norm"),),
}
_OUTSIDE = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
_HEADS = (
    "say num_head_channels=..., or num_heads=..., as the model was trained: the weights are the "
    "same for any number of heads"
)
_ORDER = (
    "say use_new_attention_order=True or False, as the model was trained: the weights of queries, "
    "keys and values are shuffled differently, and have the same shape. improved-diffusion has no "
    "such option, which is False"
)


def convert(state: State, options: Mapping[str, Any]) -> tuple[UNet2DConfig, dict[str, Tensor]]:
    """Configuration and weights of a U-Net; CheckpointError if UNet2DModel cannot be that U-Net."""
    _refuse_others(state)
    config = _config(state, options)
    moving = Renaming(state)
    for theirs, ours in _OUTSIDE:
        moving.move(theirs, ours)
    if "label_emb.weight" in state:
        moving.put("class_embedding.weight", moving.take("label_emb.weight"))
    for theirs, part in _numbered(config):
        for their_layer, our_layer in _LAYERS[part.kind]:
            moving.move(f"{theirs}.{their_layer}", f"{part.name}.{our_layer}")
        if part.kind == "resnet" and moving.has(f"{theirs}.{_SHORTCUT[0]}.weight"):
            moving.move(f"{theirs}.{_SHORTCUT[0]}", f"{part.name}.{_SHORTCUT[1]}")
        if part.kind == "attention":
            _move_attention(moving, theirs, part, config, options)
    return config, moving.finish()


def _refuse_others(state: State) -> None:
    """CheckpointError for networks that share this layout's names, but are no such U-Net."""
    if any("transformer_blocks" in name or "encoder_kv" in name for name in state):
        raise CheckpointError(
            "is a U-Net with attention to a text, which UNet2DModel has not: read it with "
            "diffusers, for example StableDiffusionPipeline.from_single_file"
        )
    if not indices(state, r"output_blocks\.(\d+)\."):
        raise CheckpointError(
            "is a classifier of guided-diffusion, not a diffusion model: it has no output_blocks"
        )


def _config(state: State, options: Mapping[str, Any]) -> UNet2DConfig:
    levels, layers, resampling = _levels(state)
    first = [1 + level * (layers + 1) for level in range(levels)]
    widths = [size(state, f"input_blocks.{i}.0.in_layers.2.weight", 0) for i in first]
    attention = [
        level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in state
    ]
    features = size(state, "time_embed.0.weight", 1)
    if features != widths[0]:
        raise CheckpointError(
            f"embeds the time by {features} sines and cosines, but its first level has "
            f"{widths[0]} channels (channel_mult does not begin with 1): UNet2DModel has as many "
            "sines and cosines as channels in the first level"
        )
    doubled = size(state, "input_blocks.1.0.emb_layers.1.weight", 0) == 2 * widths[0]
    return make_config(
        widths=widths,
        attention=attention,
        resampling=resampling,
        sample_size=options.get("image_size"),
        in_channels=size(state, "input_blocks.0.0.weight", 1),
        out_channels=size(state, "out.2.weight", 0),
        layers_per_block=layers,
        time_embedding_dim=size(state, "time_embed.0.weight", 0),
        resnet_time_scale_shift="scale_shift" if doubled else "default",
        attention_head_dim=_head_dim(widths, {*attention, levels - 1}, options),
        attn_norm_num_groups=32,  # GroupNorm has 32 groups everywhere in these programs
        num_class_embeds=size(state, "label_emb.weight", 0)
        if "label_emb.weight" in state
        else None,
    )


def _levels(state: State) -> tuple[int, int, str]:
    """Number of levels, of residual blocks in each, and how levels are resampled."""
    blocks = indices(state, r"output_blocks\.(\d+)\.")
    by_conv = indices(state, r"output_blocks\.(\d+)\.\d+\.conv\.weight")
    by_resnet = indices(state, r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight")
    up = by_conv or by_resnet
    levels = len(up) + 1
    layers = len(blocks) // levels - 1
    regular = up == [(level + 1) * (layers + 1) - 1 for level in range(levels - 1)]
    if not regular or len(blocks) != levels * (layers + 1) or blocks[-1] != len(blocks) - 1:
        raise CheckpointError(
            f"has {len(blocks)} output_blocks, of which {len(up)} change the resolution: wanted "
            "the same number of residual blocks in each level"
        )
    down = indices(state, r"input_blocks\.(\d+)\.")
    if down != list(range(levels * (layers + 1))):
        raise CheckpointError(
            f"has {len(down)} input_blocks with weights, wanted {levels * (layers + 1)}. A model "
            "that changes the resolution without weights (conv_resample=False) cannot be a "
            "UNet2DModel, which does it by a convolution or a residual block"
        )
    return levels, layers, "resnet" if by_resnet else "conv"


def _head_dim(
    widths: list[int], attended: set[int], options: Mapping[str, Any]
) -> int | tuple[int, ...] | None:
    """Channels of a head, None for a single head, of levels of those widths.

    The same number of heads at levels of different widths gives a number for each level, which
    means nothing where there is no attention.
    """
    given = [name for name in ("num_heads", "num_head_channels") if name in options]
    if len(given) != 1:
        text = f"got {' and '.join(given)}" if given else "does not tell them"
        raise CheckpointError(f"needs the number of heads of its attention, but {text}: {_HEADS}")
    (name,) = given
    value: int = options[name]
    for width in (widths[level] for level in sorted(attended)):
        if value < 1 or width % value:
            raise CheckpointError(
                f"has attention over {width} channels, which {name}={value} does not divide"
            )
    if name == "num_head_channels":
        return value
    if value == 1:
        return None
    dims = {widths[level] // value for level in attended}
    if len(dims) == 1:  # which diffusers can read
        return dims.pop()
    return tuple(max(width // value, 1) for width in widths)


def _numbered(config: UNet2DConfig) -> Iterator[tuple[str, Part]]:
    """Each part of our U-Net with its name in this layout."""
    block = {"down": 0, "mid": -1, "up": -1}  # input_blocks.0 is the first convolution
    child = 0
    for part in parts(config):
        starts = part.kind == "resnet" or part.kind.startswith("down_")
        if part.way == "mid":
            block["mid"] += 1
            yield f"middle_block.{block['mid']}", part
            continue
        child = 0 if starts else child + 1
        block[part.way] += starts
        side = "input" if part.way == "down" else "output"
        yield f"{side}_blocks.{block[part.way]}.{child}", part


def _move_attention(
    moving: Renaming, theirs: str, part: Part, config: UNet2DConfig, options: Mapping[str, Any]
) -> None:
    """Split queries, keys and values, which are one layer there, and move the output's layer."""
    weight, bias = (moving.take(f"{theirs}.qkv.{kind}") for kind in ("weight", "bias"))
    weight = as_linear(weight)  # [3 C, C]
    channels = weight.shape[1]
    if weight.shape[0] != 3 * channels or bias.shape != (3 * channels,):
        raise CheckpointError(
            f"has {theirs}.qkv of shape {tuple(weight.shape)}, wanted 3 times {channels} outputs"
        )
    heads = channels // (config.head_dim(part.level) or channels)
    new_order = options.get("use_new_attention_order")
    if heads > 1 and new_order is None:
        raise CheckpointError(f"needs the order of queries, keys and values: {_ORDER}")
    for kind, value in (("weight", weight), ("bias", bias)):
        if new_order:  # queries of all heads, then keys of all heads, then values
            split = value.chunk(3)
        else:  # for each head its queries, keys and values
            split = tuple(x.flatten(0, 1) for x in value.unflatten(0, (heads, 3, -1)).unbind(1))
        for layer, rows in zip(("to_q", "to_k", "to_v"), split, strict=True):
            moving.put(f"{part.name}.{layer}.{kind}", rows)
    moving.move(f"{theirs}.proj_out", f"{part.name}.to_out.0", as_linear)


OPENAI = Layout(
    "improved-diffusion or guided-diffusion",
    ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"),
    convert,
    {
        "image_size": (int, "height and width of the images, which is recorded only"),
        "num_heads": (int, "heads of every attention"),
        "num_head_channels": (int, "channels of a head, in place of num_heads"),
        "use_new_attention_order": (bool, "queries, keys, values are split before the heads are"),
    },
)
