"""A U-Net in the manner of guided-diffusion: norms in float32, SiLU and convolutions in sequences,
scale and shift from the embedding, blocks that are routed by what they take."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm32(nn.GroupNorm):
    """Computes in float32, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class TakesEmbedding(nn.Module):
    """A block whose forward has a second argument, the embedding."""


class Stage(nn.Sequential):
    """Layers in turn; those that take the embedding are given it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TakesEmbedding) else layer(x)
        return x


class Resample(nn.Module):
    """Nearest 2x up or mean of 2x2 down, with or without a convolution."""

    def __init__(self, channels: int, direction: str, use_conv: bool) -> None:
        super().__init__()
        self.up = direction == "up"
        self.op: nn.Module = nn.Identity()
        if use_conv:
            self.op = nn.Conv2d(channels, channels, 3, stride=1 if self.up else 2, padding=1)
        elif not self.up:
            self.op = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.op(x)


class ResBlock(TakesEmbedding):
    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        *,
        direction: str | None = None,
        scale_shift: bool,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            GroupNorm32(8, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.h_upd = self.x_upd = nn.Identity()
        if direction:
            self.h_upd = Resample(channels, direction, use_conv=False)
            self.x_upd = Resample(channels, direction, use_conv=False)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, out_channels * (2 if scale_shift else 1))
        )
        self.out_layers = nn.Sequential(
            GroupNorm32(8, out_channels),
            nn.SiLU(),
            nn.Dropout(p=0.1),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if out_channels != channels:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)
        self.updown = direction is not None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            rest, conv = self.in_layers[:-1], self.in_layers[-1]
            h = conv(self.h_upd(rest(x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        if self.scale_shift:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over the pixels; heads are split before queries, keys and values are."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm32(8, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))  # [B, 3 C, L]
        width, length = c // self.heads, qkv.shape[-1]
        q, k, v = qkv.reshape(b * self.heads, 3 * width, length).split(width, dim=1)
        scale = 1 / math.sqrt(math.sqrt(width))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, length)
        return (x + self.proj_out(h)).reshape(b, c, *spatial)


def timestep_embedding(timesteps: Tensor, width: int, max_period: int = 10000) -> Tensor:
    half = width // 2
    steps = torch.arange(start=0, end=half, dtype=torch.float32)
    freqs = torch.exp(-math.log(max_period) * steps / half).to(device=timesteps.device)
    args = timesteps[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class GuidedUNet(nn.Module):
    """Two levels; attention at the lower one.

    ``resblock_updown`` and ``scale_shift`` are what ImageNet's models use; without them it is
    the layout of improved DDPM's.
    """

    def __init__(
        self, width: int = 16, *, scale_shift: bool = True, resblock_updown: bool = True
    ) -> None:
        super().__init__()
        self.width, self.dtype, emb = width, torch.float32, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))

        def block(channels: int, out: int, direction: str | None = None) -> ResBlock:
            return ResBlock(channels, emb, out, direction=direction, scale_shift=scale_shift)

        def resample(channels: int, direction: str) -> nn.Module:
            if resblock_updown:
                return block(channels, channels, direction)
            return Resample(channels, direction, use_conv=True)

        wide = 2 * width
        self.input_blocks = nn.ModuleList(
            [
                Stage(nn.Conv2d(3, width, 3, padding=1)),
                Stage(block(width, width)),
                Stage(resample(width, "down")),
                Stage(block(width, wide), AttentionBlock(wide, 2)),
            ]
        )
        self.middle_block = Stage(block(wide, wide), AttentionBlock(wide, 4), block(wide, wide))
        self.output_blocks = nn.ModuleList(
            [
                Stage(block(wide + wide, wide), AttentionBlock(wide, 2)),
                Stage(block(wide + width, wide), AttentionBlock(wide, 2), resample(wide, "up")),
                Stage(block(wide + width, width)),
                Stage(block(width + width, width)),
            ]
        )
        self.out = nn.Sequential(
            GroupNorm32(8, width), nn.SiLU(), nn.Conv2d(width, 6, 3, padding=1)
        )

    def convert_torso(self, dtype: torch.dtype) -> GuidedUNet:
        """Convolutions in another dtype; norms and the embedding's layers stay in float32."""
        self.dtype = dtype
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module is not self.out[-1]:
                module.to(dtype)
        return self

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        skips = []
        features = timestep_embedding(timesteps, self.width)
        emb = self.time_embed(features.to(self.time_embed[0].weight.dtype))
        h = x.type(self.dtype)
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))
