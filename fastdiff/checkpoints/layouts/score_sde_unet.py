"""The U-Nets of score_sde (arXiv:2011.13456), whose parts are numbered in the order of the calls.

Its model ddpm can be a UNet2DModel. Its models DDPM++ and NCSN++ (ncsnpp) cannot, for two reasons:
they divide every residual sum by sqrt(2), and their resampling residual blocks have a convolution
in the shortcut although the channels stay the same.

On the way up a level of score_sde has attention once, after its last residual block; UNet2DModel
has it after every residual block. The others are given an output layer of zeros: they add exactly
nothing, and cost their time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.layouts.ddim_unet import DDPM_FACTS
from fastdiff.checkpoints.layouts.layout import (
    Layout,
    Renaming,
    State,
    Table,
    indices,
    make_config,
    parts,
    size,
)
from fastdiff.common.errors import CheckpointError
from fastdiff.nn.config import UNet2DConfig

_ALL = "all_modules"
_FIRST = 3  # two layers of the time embedding and the first convolution come before the levels
_RESNET = (
    ("GroupNorm_0", "norm1"),
    ("Conv_0", "conv1"),
    ("Dense_0", "time_emb_proj"),
    ("GroupNorm_1", "norm2"),
    ("Conv_1", "conv2"),
)
_LAYERS: Table = {
    "resnet": _RESNET,
    "down_conv": (("Conv_0", "conv"),),
    "up_conv": (("Conv_0", "conv"),),
    "attention": (("GroupNorm_0", "group_norm"),),
}
_PROJECTIONS = (("NIN_0", "to_q"), ("NIN_1", "to_k"), ("NIN_2", "to_v"), ("NIN_3", "to_out.0"))
_OUTSIDE = (
    (f"{_ALL}.0", "time_embedding.linear_1"),
    (f"{_ALL}.1", "time_embedding.linear_2"),
    (f"{_ALL}.2", "conv_in"),
)


def convert(state: State, options: Mapping[str, Any]) -> tuple[UNet2DConfig, dict[str, Tensor]]:
    """Configuration and weights of a U-Net; CheckpointError if UNet2DModel cannot be that U-Net."""
    _refuse_plus_plus(state)
    config = _config(state, options)
    moving = Renaming(state)
    moving.drop("sigmas")
    for theirs, ours in _OUTSIDE:
        moving.move(theirs, ours)
    number = _FIRST
    for part in parts(config):
        if part.kind == "attention" and part.way == "up" and not part.last:
            _add_nothing(moving, part.name, config.block_out_channels[part.level])
            continue
        theirs = f"{_ALL}.{number}"
        number += 1
        for their_layer, our_layer in _LAYERS[part.kind]:
            moving.move(f"{theirs}.{their_layer}", f"{part.name}.{our_layer}")
        if part.kind == "attention":
            for their_layer, our_layer in _PROJECTIONS:
                _move_projection(moving, f"{theirs}.{their_layer}", f"{part.name}.{our_layer}")
        if moving.has(f"{theirs}.NIN_0.W"):
            shortcut = f"{part.name}.conv_shortcut"
            _move_projection(moving, f"{theirs}.NIN_0", shortcut, lambda x: x[:, :, None, None])
    moving.move(f"{_ALL}.{number}", "conv_norm_out")
    moving.move(f"{_ALL}.{number + 1}", "conv_out")
    return config, moving.finish()


def _refuse_plus_plus(state: State) -> None:
    """CheckpointError for NCSN++ and DDPM++."""
    reasons = []
    if any(name.endswith("Conv_2.weight") for name in state):
        reasons += [
            "its resampling residual blocks have a convolution in the shortcut (resblock_type "
            "biggan)",
            "it divides every residual sum by sqrt(2) (skip_rescale)",
        ]
    if f"{_ALL}.0.W" in state:
        reasons.append("it embeds the logarithm of sigma by random features (fourier)")
    if any(name.endswith("Conv2d_0.weight") for name in state):
        reasons.append("it resamples by filters (fir)")
    if reasons:
        raise CheckpointError(
            f"is a DDPM++ or NCSN++ of score_sde, which UNet2DModel cannot be: {'; '.join(reasons)}"
        )


def _config(state: State, options: Mapping[str, Any]) -> UNet2DConfig:
    for name, path in (("centered", "config.data"), ("scale_by_sigma", "config.model")):
        if name not in options:
            raise CheckpointError(
                f"does not tell {name}: say {name}=True or False, as {path}.{name} of its training"
            )
    if options["scale_by_sigma"]:
        raise CheckpointError(
            "divides its output by sigma (scale_by_sigma), which UNet2DModel does with fourier "
            "embeddings alone"
        )
    first, layers, attention = _levels(state)
    last = indices(state, rf"{_ALL}\.(\d+)\.")[-1]
    return make_config(
        widths=[size(state, f"{_ALL}.{number}.Conv_0.weight", 0) for number in first],
        attention=attention,
        resampling="conv",
        sample_size=options.get("image_size"),
        in_channels=size(state, f"{_ALL}.2.weight", 1),
        out_channels=size(state, f"{_ALL}.{last}.weight", 0),
        center_input_sample=not options["centered"],
        layers_per_block=layers,
        time_embedding_dim=size(state, f"{_ALL}.0.weight", 0),
        **DDPM_FACTS,
    )


def _levels(state: State) -> tuple[list[int], int, list[int]]:
    """The number of each level's first residual block, residual blocks in a level, attention."""
    kinds = {}
    for number in indices(state, rf"{_ALL}\.(\d+)\."):
        theirs = f"{_ALL}.{number}"
        if f"{theirs}.GroupNorm_1.weight" in state:
            kinds[number] = "resnet"
        elif f"{theirs}.NIN_3.W" in state:
            kinds[number] = "attention"
        elif f"{theirs}.Conv_0.weight" in state:
            kinds[number] = "resampling"
    resamplings = [number for number, kind in kinds.items() if kind == "resampling"]
    resnets = [number for number, kind in kinds.items() if kind == "resnet"]
    levels = len(resamplings) // 2 + 1
    layers, rest = divmod(len(resnets) - 2 - levels, 2 * levels)
    if layers < 1 or rest or len(resamplings) % 2 or resnets[0] != _FIRST:
        raise CheckpointError(
            f"has {len(resnets)} residual blocks and {len(resamplings)} convolutions that change "
            "the resolution: wanted the same number of residual blocks in each level. (A model "
            "with resamp_with_conv=False, which resamples without weights, is no UNet2DModel)"
        )
    first = [_FIRST, *(number + 1 for number in resamplings[: levels - 1])]
    attention = [
        level for level, number in enumerate(first) if kinds.get(number + 1) == "attention"
    ]
    return first, layers, attention


def _move_projection(
    moving: Renaming, theirs: str, ours: str, change: Callable[[Tensor], Tensor] | None = None
) -> None:
    """A product with W [in, out], there under the names W and b, as a layer [out, in]."""
    weight = moving.take(f"{theirs}.W")
    if weight.ndim != 2:
        raise CheckpointError(f"has {theirs}.W of shape {tuple(weight.shape)}, wanted 2 dimensions")
    moving.put(f"{ours}.weight", weight.T if change is None else change(weight.T))
    moving.put(f"{ours}.bias", moving.take(f"{theirs}.b"))


def _add_nothing(moving: Renaming, ours: str, channels: int) -> None:
    """An attention whose output is zero, so that its residual sum is its input."""
    moving.put(f"{ours}.group_norm.weight", torch.ones(channels))
    moving.put(f"{ours}.group_norm.bias", torch.zeros(channels))
    for _, layer in _PROJECTIONS:
        moving.put(f"{ours}.{layer}.weight", torch.zeros(channels, channels))
        moving.put(f"{ours}.{layer}.bias", torch.zeros(channels))


SCORE_SDE = Layout(
    "score_sde",
    (f"{_ALL}.1.weight", f"{_ALL}.2.weight"),
    convert,
    {
        "image_size": (int, "height and width of the images, which is recorded only"),
        "centered": (bool, "config.data.centered: images are in [-1, 1], not in [0, 1]"),
        "scale_by_sigma": (bool, "config.model.scale_by_sigma: the output is divided by sigma"),
    },
)
