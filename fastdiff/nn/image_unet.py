"""Make a network for images of a given size from a few numbers."""

from __future__ import annotations

import math

from fastdiff.common.errors import InputError
from fastdiff.nn.karras_unet import KarrasUNet
from fastdiff.nn.unet import UNet2DModel

# Timesteps 0..999 times this are as far apart as log(sigma) / 4 in EDM, for which the frequencies
# of ``KarrasUNet`` are meant.
SCALE_OF_TIMESTEPS = 0.0025


def make_unet(
    image_size: int | tuple[int, ...],
    channels: int = 1,
    num_classes: int = 0,
    *,
    widths: tuple[int, ...] = (32, 64, 64),
    layers_per_block: int = 2,
    attention: tuple[int, ...] = (1, 2),
    dropout: float = 0.0,
    learned_variance: bool = False,
    self_condition: bool = False,
) -> UNet2DModel:
    """A U-Net for images of one size, its weights initialised from torch's global generator.

    Args:
        image_size: height and width; divisible by 2 ** (number of levels - 1). Of several numbers
            it is (H, W), (L,) of signals, or (F, H, W) of videos, whose F is free.
        channels: of the images.
        num_classes: classes to condition on; 0 for an unconditional model.
        widths: feature channels of each level; each level has half the resolution of the one
            before.
        layers_per_block: residual blocks in each level.
        attention: the levels with self-attention; level 0 has the full resolution.
        dropout: probability of dropout in every residual block.
        learned_variance: return twice the channels, for the objectives hybrid and vlb.
        self_condition: take the last estimate of x0, too, see ``UNet2DConfig``.

    Raises:
        InputError: sizes that do not fit together.
    """
    _check(image_size, widths, layers_per_block, attention, dropout)
    kinds = [
        "AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(len(widths))
    ]
    head_dim = math.gcd(32, *widths)
    # At most 32 groups, of 4 channels or more.
    groups = math.gcd(32, *(width // 4 or 1 for width in widths), *widths)
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels * (2 if self_condition else 1),
        out_channels=channels * (2 if learned_variance else 1),
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        down_block_types=tuple(kinds),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        norm_num_groups=groups,
        attention_head_dim=head_dim,
        dropout=dropout,
        num_class_embeds=num_classes or None,
        self_condition=self_condition,
        dimensions=2 if isinstance(image_size, int) else len(image_size),
    )


def make_karras_unet(
    image_size: int,
    channels: int = 1,
    num_classes: int = 0,
    *,
    widths: tuple[int, ...] = (32, 64, 64),
    layers_per_block: int = 2,
    attention: tuple[int, ...] = (1, 2),
    dropout: float = 0.0,
    time_scale: float = 1.0,
) -> KarrasUNet:
    """EDM2's network for images of one size, see :func:`make_unet`.

    Args:
        image_size: height and width; divisible by 2 ** (number of levels - 1).
        channels: of the images.
        num_classes: classes to condition on; 0 for an unconditional model.
        widths: feature channels of each level.
        layers_per_block: blocks in each level.
        attention: the levels with self-attention; the coarsest has one block with it anyway.
        dropout: probability of dropout in every block.
        time_scale: factor of the time before its embedding: 1 for the label log(sigma) / 4 of EDM,
            ``SCALE_OF_TIMESTEPS`` for timesteps 0..999.

    Raises:
        InputError: sizes that do not fit together.
    """
    _check(image_size, widths, layers_per_block, attention, dropout)
    head_dim = math.gcd(64, *(widths[level] for level in (*attention, -1)))
    return KarrasUNet(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        attention_levels=tuple(attention),
        attention_head_dim=head_dim,
        num_class_embeds=num_classes or None,
        dropout=dropout,
        time_scale=time_scale,
    )


def _check(
    image_size: int | tuple[int, ...],
    widths: tuple[int, ...],
    layers_per_block: int,
    attention: tuple[int, ...],
    dropout: float,
) -> None:
    """InputError for sizes that do not fit together."""
    levels = len(widths)
    if levels == 0 or min(widths) < 1 or layers_per_block < 1:
        raise InputError(f"widths and layers must be positive, got {widths} and {layers_per_block}")
    sizes = (image_size,) if isinstance(image_size, int) else image_size
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise InputError(f"a size must be one to three numbers from 1, got {image_size}")
    if any(size % 2 ** (levels - 1) for size in sizes[-2:]):
        raise InputError(
            f"{levels} levels halve the image {levels - 1} times: "
            f"its size must be divisible by {2 ** (levels - 1)}, got {image_size}"
        )
    wrong = [level for level in attention if not 0 <= level < levels]
    if wrong:
        raise InputError(f"attention level {wrong[0]} does not exist: there are 0..{levels - 1}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must lie in [0, 1), got {dropout}")
