"""A convolutional decoder in the manner of latent diffusion's autoencoder: x * sigmoid(x),
single-head attention by batched products, no time embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=8, num_channels=channels, eps=1e-6, affine=True)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = None
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        b, c, height, width = q.shape
        q = q.reshape(b, c, height * width).permute(0, 2, 1)
        w = torch.bmm(q, k.reshape(b, c, height * width)) * c**-0.5
        w = F.softmax(w, dim=2).permute(0, 2, 1)
        h = torch.bmm(v.reshape(b, c, height * width), w).reshape(b, c, height, width)
        return x + self.proj_out(h)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PlainDecoder(nn.Module):
    """Latents [N, 4, H, W] -> images [N, 3, 4 H, 4 W]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        wide = 2 * width
        self.conv_in = nn.Conv2d(4, wide, 3, padding=1)
        self.mid = nn.Sequential(ResnetBlock(wide, wide), AttnBlock(wide), ResnetBlock(wide, wide))
        self.up = nn.Sequential(
            ResnetBlock(wide, wide), Upsample(wide),
            ResnetBlock(wide, width), Upsample(width),
            ResnetBlock(width, width),
        )  # fmt: skip
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.up(self.mid(self.conv_in(z)))
        return self.conv_out(swish(self.norm_out(h)))
