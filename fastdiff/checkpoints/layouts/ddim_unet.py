"""The U-Net of DDPM as PyTorch programs first had it (arXiv:2006.11239; ddim, arXiv:2010.02502).

Levels are named down.L and up.L, L = 0 at full resolution. Every fact that the tensors do not tell
is the same in all models of this layout.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("temb_proj", "time_emb_proj"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
)
_LAYERS: Table = {
    "resnet": _RESNET,
    "down_conv": (("conv", "conv"),),
    "up_conv": (("conv", "conv"),),
    "attention": (("norm", "group_norm"),),
}
_PROJECTIONS = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
_OUTSIDE = (
    ("temb.dense.0", "time_embedding.linear_1"),
    ("temb.dense.1", "time_embedding.linear_2"),
    ("conv_in", "conv_in"),
    ("norm_out", "conv_norm_out"),
    ("conv_out", "conv_out"),
)
# Of both U-Nets that were written after DDPM's: this one's and score_sde's.
DDPM_FACTS: Mapping[str, Any] = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}


def convert(state: State, options: Mapping[str, Any]) -> tuple[UNet2DConfig, dict[str, Tensor]]:
    """Configuration and weights of a U-Net; CheckpointError if UNet2DModel cannot be that U-Net."""
    levels = range(len(indices(state, r"down\.(\d+)\.block\.")))
    config = make_config(
        widths=[size(state, f"down.{level}.block.0.conv1.weight", 0) for level in levels],
        attention=[level for level in levels if f"down.{level}.attn.0.q.weight" in state],
        resampling="conv",
        sample_size=options.get("image_size"),
        in_channels=size(state, "conv_in.weight", 1),
        out_channels=size(state, "conv_out.weight", 0),
        layers_per_block=len(indices(state, r"down\.0\.block\.(\d+)\.")),
        time_embedding_dim=size(state, "temb.dense.0.weight", 0),
        **DDPM_FACTS,
    )
    if any(".conv_shortcut." in name for name in state):
        raise CheckpointError(
            "has 3x3 convolutions as shortcuts of residual blocks (conv_shortcut), UNet2DModel has "
            "1x1 convolutions"
        )
    if len(levels) > 1 and "down.0.downsample.conv.weight" not in state:
        raise CheckpointError(
            "changes the resolution without weights (resamp_with_conv=False), UNet2DModel does it "
            "by a convolution or a residual block"
        )
    moving = Renaming(state)
    for theirs, ours in _OUTSIDE:
        moving.move(theirs, ours)
    for part in parts(config):
        theirs = _name(part)
        for their_layer, our_layer in _LAYERS[part.kind]:
            moving.move(f"{theirs}.{their_layer}", f"{part.name}.{our_layer}")
        if moving.has(f"{theirs}.nin_shortcut.weight"):
            moving.move(f"{theirs}.nin_shortcut", f"{part.name}.conv_shortcut")
        if part.kind == "attention":
            for their_layer, our_layer in _PROJECTIONS:
                moving.move(f"{theirs}.{their_layer}", f"{part.name}.{our_layer}", as_linear)
    return config, moving.finish()


def _name(part: Part) -> str:
    if part.way == "mid":
        return f"mid.{'attn' if part.kind == 'attention' else 'block'}_{part.index + 1}"
    if part.kind.endswith("_conv"):
        return f"{part.way}.{part.level}.{part.way}sample"
    return f"{part.way}.{part.level}.{'attn' if part.kind == 'attention' else 'block'}.{part.index}"


DDIM = Layout(
    "DDPM in PyTorch (ddim, pytorch_diffusion)",
    ("temb.dense.0.weight", "conv_in.weight", "mid.block_1.norm1.weight"),
    convert,
    {"image_size": (int, "height and width of the images, which is recorded only")},
)
