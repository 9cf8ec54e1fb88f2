"""A net that compiles in a moment and has a weight of every kind that the compiler packs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import randomized
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Two residual blocks that share the time embedding, attention, and 3x3 and 1x1 shortcuts."""

    def __init__(self, dropout: float = 0.0, width: int = 16) -> None:
        super().__init__()
        wide = 2 * width
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.time1, self.time2 = nn.Linear(18, wide), nn.Linear(18, width)
        self.norm1, self.conv1 = nn.GroupNorm(4, width), nn.Conv2d(width, wide, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, wide), nn.Conv2d(wide, width, 3, padding=1)
        self.norm3 = nn.GroupNorm(4, width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm4, self.conv3 = nn.GroupNorm(8, wide), nn.Conv2d(wide, width, 3, padding=1)
        self.shortcut = nn.Conv2d(wide, width, 1)
        self.norm_out, self.conv_out = nn.GroupNorm(4, width), nn.Conv2d(width, 3, 3, padding=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = skip = self.conv_in(x)
        emb = F.silu(emb)
        h = self.conv1(F.silu(self.norm1(x))) + self.time1(emb)[:, :, None, None]
        x = x + self.conv2(self.dropout(F.silu(self.norm2(h))))
        n, c, height, width = x.shape
        rows = self.norm3(x.view(n, c, height * width)).transpose(1, 2)
        q, k, v = self.q(rows), self.k(rows), self.v(rows)
        rows = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        x = x + self.out(rows).transpose(1, 2).reshape(n, c, height, width)
        x = torch.cat([x, skip], dim=1)
        h = self.conv3(F.silu(self.norm4(x))) + self.time2(emb)[:, :, None, None]
        x = (self.shortcut(x) + self.dropout(h)) / 2**0.5
        return self.conv_out(F.silu(self.norm_out(x)))


def small_net(dropout: float = 0.0, seed: int = 0) -> SmallNet:
    """In eval mode, its weights always the same."""
    return randomized(SmallNet(dropout), seed).eval()


def small_inputs(
    batch: int = 2, size: tuple[int, int] = (8, 12), seed: int = 1, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, *size, generator=generator)
    return x.to(dtype or x.dtype), torch.randn(batch, 18, generator=generator).to(dtype or x.dtype)
