"""Make the parts of a U-Net from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from fastdiff.nn.blocks import DownBlock2D, Make, UNetMidBlock2D, UpBlock2D
from fastdiff.nn.config import UNet2DConfig, block_kind
from fastdiff.nn.embeddings import FourierProjection, SinusoidalProjection, TimestepEmbedding
from fastdiff.nn.resample import Downsample2D, Upsample2D
from fastdiff.nn.resnet import ResnetBlock2D
from fastdiff.nn.self_attention import Attention, FrameAttention


def time_projection(config: UNet2DConfig) -> nn.Module:
    """A module timesteps [N] -> features [N, C], C being ``_projected_channels(config)``."""
    width = config.block_out_channels[0]
    if config.time_embedding_type == "fourier":
        return FourierProjection(width)
    if config.time_embedding_type == "learned":
        assert config.num_train_timesteps is not None  # UNet2DConfig has checked
        return nn.Embedding(config.num_train_timesteps, width)
    return SinusoidalProjection(
        width, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
    )


def time_embedding(config: UNet2DConfig) -> nn.Module:
    """A module features of the timesteps [N, C] -> embedding [N, D]."""
    return TimestepEmbedding(_projected_channels(config), config.embedding_channels)


def class_embedding(config: UNet2DConfig) -> nn.Module | None:
    """A module class labels, or their features -> embedding [N, D]; None without classes."""
    if config.class_embed_type == "timestep":
        return TimestepEmbedding(_projected_channels(config), config.embedding_channels)
    if config.class_embed_type == "identity":
        return nn.Identity()
    if config.num_class_embeds is None:
        return None
    return nn.Embedding(config.num_class_embeds, config.embedding_channels)


def down_blocks(config: UNet2DConfig) -> Iterator[DownBlock2D]:
    """The levels on the way down, beginning at full resolution."""
    resnet, widths = _resnet(config), config.block_out_channels
    for level, kind in enumerate(map(block_kind, config.down_block_types)):
        width = widths[level]
        downsampler: nn.Module | None = None
        if level + 1 < len(widths):
            if _resamples_by_resnet(kind, config.downsample_type):
                downsampler = resnet(width, width, down=True)
            else:
                downsampler = Downsample2D(width, config.downsample_padding, config.kernel)
        yield DownBlock2D(
            widths[max(level - 1, 0)],
            width,
            layers=config.layers_per_block,
            resnet=resnet,
            attention=_attention(config, level) if "Attn" in kind else nn.Identity,
            downsampler=downsampler,
            frame_attention=_frame_attention(config, level) if "Attn" in kind else None,
        )


def mid_block(config: UNet2DConfig) -> UNetMidBlock2D | None:
    """The middle block, or None for a model that has none."""
    if config.mid_block_type is None:
        return None
    groups = config.attn_norm_num_groups
    if groups is None and config.resnet_time_scale_shift == "default":
        groups = config.norm_num_groups
    scale = config.mid_block_scale_factor
    level = len(config.block_out_channels) - 1
    attention = partial(_attention(config, level), groups=groups, output_scale_factor=scale)
    return UNetMidBlock2D(
        config.block_out_channels[-1],
        resnet=partial(_resnet(config), output_scale_factor=scale),
        attention=attention if config.add_attention else nn.Identity,
        frame_attention=_frame_attention(config, level) if config.add_attention else None,
    )


def up_blocks(config: UNet2DConfig) -> Iterator[UpBlock2D]:
    """The levels on the way up, beginning at the coarsest resolution."""
    resnet, widths = _resnet(config), config.block_out_channels[::-1]
    for level, kind in enumerate(map(block_kind, config.up_block_types)):
        width, last = widths[level], level + 1 == len(widths)
        finer = width if last else widths[level + 1]
        upsampler: nn.Module | None = None
        if not last:
            if _resamples_by_resnet(kind, config.upsample_type):
                upsampler = resnet(width, width, up=True)
            else:
                upsampler = Upsample2D(width, config.kernel)
        yield UpBlock2D(
            widths[max(level - 1, 0)],
            width,
            # Skips in the order in which they are read: the outputs of this level's residual
            # blocks on the way down, then the output of the finer level.
            [width] * config.layers_per_block + [finer],
            resnet=resnet,
            attention=_attention(config, len(widths) - 1 - level)
            if "Attn" in kind
            else nn.Identity,
            upsampler=upsampler,
            frame_attention=_frame_attention(config, len(widths) - 1 - level)
            if "Attn" in kind
            else None,
        )


def _projected_channels(config: UNet2DConfig) -> int:
    return config.block_out_channels[0] * (2 if config.time_embedding_type == "fourier" else 1)


def _resnet(config: UNet2DConfig) -> Make:
    return partial(
        ResnetBlock2D,
        temb_channels=config.embedding_channels,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        dropout=config.dropout,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        kernel=config.kernel,
    )


def _attention(config: UNet2DConfig, level: int) -> partial[Attention]:
    return partial(
        Attention,
        head_dim=config.head_dim(level),
        groups=config.norm_num_groups,
        eps=config.norm_eps,
    )


def _frame_attention(config: UNet2DConfig, level: int) -> Make | None:
    """What makes attention over frames, which models of videos alone have."""
    if config.dimensions != 3:
        return None
    return partial(FrameAttention, **_attention(config, level).keywords)


def _resamples_by_resnet(kind: str, option: str) -> bool:
    """Whether a level resamples in a residual block; diffusers reads the option with attention."""
    return kind.startswith("Resnet") or ("Attn" in kind and option == "resnet")
