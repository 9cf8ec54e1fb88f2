"""A U-Net in the manner of lucidrains: RMS norms over channels, linear and full attention with
learned keys and values, downsampling that moves pixels into channels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * self.scale


class PixelsToChannels(nn.Module):
    """b c (h p1) (w p2) -> b (c p1 p2) h w, with p1 = p2 = 2."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return x.reshape(b, 4 * c, h // 2, w // 2)


def downsample(channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(PixelsToChannels(), nn.Conv2d(4 * channels, out_channels, 1))


def upsample(channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(channels, out_channels, 3, padding=1),
    )


class SinusoidalPosEmb(nn.Module):
    def __init__(self, width: int, theta: float = 10000) -> None:
        super().__init__()
        self.width, self.theta = width, theta

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        step = math.log(self.theta) / (half - 1)
        freqs = torch.exp(torch.arange(half, device=t.device) * -step)
        emb = t[:, None] * freqs[None, :]
        return torch.cat((emb.sin(), emb.cos()), dim=-1).to(t.dtype)


class Block(nn.Module):
    def __init__(self, channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm = RMSNorm(out_channels)
        self.act = nn.SiLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, ...] | None = None) -> Tensor:
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return self.dropout(self.act(x))


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, time_channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, out_channels * 2))
        self.block1 = Block(channels, out_channels, dropout=0.1)
        self.block2 = Block(out_channels, out_channels)
        self.res_conv = (
            nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale_shift = self.mlp(time)[:, :, None, None].chunk(2, dim=1)
        h = self.block2(self.block1(x, scale_shift))
        return h + self.res_conv(x)


class LinearAttention(nn.Module):
    def __init__(self, channels: int, heads: int = 2, head: int = 8, learned: int = 4) -> None:
        super().__init__()
        self.heads, self.scale, inner = heads, head**-0.5, heads * head
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, head, learned))
        self.to_qkv = nn.Conv2d(channels, inner * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(inner, channels, 1), RMSNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        parts = self.to_qkv(self.norm(x)).chunk(3, dim=1)
        q, k, v = (part.reshape(b, self.heads, -1, h * w) for part in parts)
        mk, mv = (kv[None].expand(b, -1, -1, -1) for kv in self.mem_kv)
        k, v = torch.cat((mk, k), dim=-1), torch.cat((mv, v), dim=-1)
        q, k = q.softmax(dim=-2) * self.scale, k.softmax(dim=-1)
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        out = torch.einsum("b h d e, b h d n -> b h e n", context, q)
        return self.to_out(out.reshape(b, -1, h, w))


class FullAttention(nn.Module):
    def __init__(self, channels: int, heads: int = 2, head: int = 8, learned: int = 4) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, learned, head))
        self.to_qkv = nn.Conv2d(channels, inner * 3, 1, bias=False)
        self.to_out = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        parts = self.to_qkv(self.norm(x)).chunk(3, dim=1)
        q, k, v = (p.reshape(b, self.heads, -1, h * w).transpose(2, 3) for p in parts)
        mk, mv = (kv[None].expand(b, -1, -1, -1) for kv in self.mem_kv)
        k, v = torch.cat((mk, k), dim=-2), torch.cat((mv, v), dim=-2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(2, 3).reshape(b, -1, h, w))


class LucidUNet(nn.Module):
    """Two levels, linear attention at the upper, full attention at the lower and in the middle."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        wide, time = 2 * width, 4 * width
        self.init_conv = nn.Conv2d(3, width, 7, padding=3)
        self.time_mlp = nn.Sequential(
            SinusoidalPosEmb(width), nn.Linear(width, time), nn.GELU(), nn.Linear(time, time)
        )
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for channels, out, attention, last in (
            (width, width, LinearAttention(width), False),
            (width, wide, FullAttention(width), True),
        ):
            self.downs.append(
                nn.ModuleList(
                    [
                        ResnetBlock(channels, channels, time),
                        ResnetBlock(channels, channels, time),
                        attention,
                        nn.Conv2d(channels, out, 3, padding=1)
                        if last
                        else downsample(channels, out),
                    ]
                )
            )
        self.mid_block1 = ResnetBlock(wide, wide, time)
        self.mid_attn = FullAttention(wide)
        self.mid_block2 = ResnetBlock(wide, wide, time)
        for channels, out, attention, last in (
            (wide, width, FullAttention(wide), False),
            (width, width, LinearAttention(width), True),
        ):
            self.ups.append(
                nn.ModuleList(
                    [
                        ResnetBlock(channels + width, channels, time),
                        ResnetBlock(channels + width, channels, time),
                        attention,
                        nn.Conv2d(channels, out, 3, padding=1) if last else upsample(channels, out),
                    ]
                )
            )
        self.final_res_block = ResnetBlock(2 * width, width, time)
        self.final_conv = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.init_conv(x)
        r = x.clone()
        t = self.time_mlp(time)
        skips = []
        for block1, block2, attn, down in self.downs:
            x = block1(x, t)
            skips.append(x)
            x = block2(x, t)
            x = attn(x) + x
            skips.append(x)
            x = down(x)
        x = self.mid_block1(x, t)
        x = self.mid_attn(x) + x
        x = self.mid_block2(x, t)
        for block1, block2, attn, up in self.ups:
            x = block1(torch.cat((x, skips.pop()), dim=1), t)
            x = block2(torch.cat((x, skips.pop()), dim=1), t)
            x = attn(x) + x
            x = up(x)
        x = self.final_res_block(torch.cat((x, r), dim=1), t)
        return self.final_conv(x)
