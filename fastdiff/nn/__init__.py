"""A plain U-Net with diffusers' configs and checkpoints, built on the fused operations."""

from __future__ import annotations

from fastdiff.nn.blocks import DownBlock2D, UNetMidBlock2D, UpBlock2D
from fastdiff.nn.classifier import NoisyClassifier
from fastdiff.nn.config import UNet2DConfig
from fastdiff.nn.embeddings import (
    FourierProjection,
    Precomputed,
    SinusoidalProjection,
    TimestepEmbedding,
)
from fastdiff.nn.image_network import ImageNetwork
from fastdiff.nn.karras_config import KarrasUNetConfig
from fastdiff.nn.karras_unet import KarrasUNet
from fastdiff.nn.norm import GroupNormSiLU
from fastdiff.nn.resample import Downsample2D, Upsample2D
from fastdiff.nn.resnet import ResnetBlock2D
from fastdiff.nn.self_attention import Attention, FrameAttention
from fastdiff.nn.unet import UNet2DModel

__all__ = [
    "Attention", "DownBlock2D", "Downsample2D", "FourierProjection", "FrameAttention",
    "GroupNormSiLU", "ImageNetwork", "KarrasUNet", "KarrasUNetConfig", "NoisyClassifier",
    "Precomputed", "ResnetBlock2D", "SinusoidalProjection", "TimestepEmbedding", "UNet2DConfig",
    "UNet2DModel", "UNetMidBlock2D", "UpBlock2D", "Upsample2D",
]  # fmt: skip
