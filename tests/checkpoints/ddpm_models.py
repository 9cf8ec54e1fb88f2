"""DDPM's U-Net as two families of PyTorch programs have it, with the names of their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels, eps=1e-6)


def features(t: Tensor, width: int) -> Tensor:
    half = width // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def attended(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head over the pixels of [N, C, H, W]."""
    q, k, v = (part.flatten(2) for part in (q, k, v))
    scores = (torch.einsum("nct,ncs->nts", q, k) / math.sqrt(x.shape[1])).softmax(-1)
    return torch.einsum("nts,ncs->nct", scores, v).view(x.shape)


class DdimRes(nn.Module):
    def __init__(self, channels: int, out: int, emb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.temb_proj = nn.Linear(emb, out)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class DdimAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.proj_out(attended(x, self.q(h), self.k(h), self.v(h)))


class Conv(nn.Module):
    """A resampling: its convolution is called conv."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=int(up))

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DdimUNet(nn.Module):
    def __init__(
        self,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        *,
        layers: int = 2,
        attention: Sequence[int] = (1,),
    ) -> None:
        super().__init__()
        emb, widths = 4 * width, [width * multiplier for multiplier in multipliers]
        self.width = width
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(width, emb), nn.Linear(emb, emb)])
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.mid, self.up = nn.ModuleList(), nn.Module(), nn.ModuleList()
        now, skips = width, [width]

        def level_of(level: int, blocks: list[DdimRes], way: str, change: bool) -> nn.Module:
            part = nn.Module()
            part.block = nn.ModuleList(blocks)
            attends = [DdimAttention(widths[level]) for _ in blocks] if level in attention else []
            part.attn = nn.ModuleList(attends)
            if change:
                setattr(part, f"{way}sample", Conv(widths[level], way == "up"))
            return part

        for level, out in enumerate(widths):
            blocks = [DdimRes(out if i else now, out, emb) for i in range(layers)]
            now, change = out, level + 1 < len(widths)
            self.down.append(level_of(level, blocks, "down", change))
            skips += [out] * (layers + change)
        self.mid.block_1, self.mid.block_2 = DdimRes(now, now, emb), DdimRes(now, now, emb)
        self.mid.attn_1 = DdimAttention(now)
        ups = []
        for level, out in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(layers + 1):
                blocks.append(DdimRes(now + skips.pop(), out, emb))
                now = out
            ups.append(level_of(level, blocks, "up", level > 0))
        self.up = nn.ModuleList(reversed(ups))
        self.norm_out, self.conv_out = norm(now), nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, second = self.temb.dense
        emb = second(F.silu(first(features(t, self.width))))
        skips = [x := self.conv_in(x)]
        for level in self.down:
            for i, block in enumerate(level.block):
                x = block(x, emb)
                x = level.attn[i](x) if len(level.attn) else x
                skips.append(x)
            if hasattr(level, "downsample"):
                skips.append(x := level.downsample(x))
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x, emb)), emb)
        for level in reversed(self.up):
            for i, block in enumerate(level.block):
                x = block(torch.cat([x, skips.pop()], dim=1), emb)
                x = level.attn[i](x) if len(level.attn) else x
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


class Nin(nn.Module):
    """A product over the channels; its weight W is [in, out]."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(channels, out))
        self.b = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,cd->ndhw", x, self.W) + self.b[:, None, None]


class SdeRes(nn.Module):
    def __init__(self, channels: int, out: int, emb: int) -> None:
        super().__init__()
        self.GroupNorm_0, self.Conv_0 = norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.Dense_0 = nn.Linear(emb, out)
        self.GroupNorm_1, self.Conv_1 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.NIN_0 = Nin(channels, out)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.Conv_0(F.silu(self.GroupNorm_0(x))) + self.Dense_0(F.silu(emb))[:, :, None, None]
        h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
        return (self.NIN_0(x) if hasattr(self, "NIN_0") else x) + h


class SdeAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = norm(channels)
        for index in range(4):
            setattr(self, f"NIN_{index}", Nin(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        return x + self.NIN_3(attended(x, self.NIN_0(h), self.NIN_1(h), self.NIN_2(h)))


class SdeConv(nn.Module):
    """A resampling: its convolution is called Conv_0."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.Conv_0 = Conv(channels, up).conv
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return Conv.forward(self, x)

    @property
    def conv(self) -> nn.Module:
        return self.Conv_0


class ScoreSdeUNet(nn.Module):
    """score_sde's model ddpm: parts in a list, attention once a level on the way up."""

    def __init__(
        self,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        *,
        layers: int = 2,
        attention: Sequence[int] = (1,),
        centered: bool = True,
    ) -> None:
        super().__init__()
        emb, widths = 4 * width, [width * multiplier for multiplier in multipliers]
        self.width, self.centered = width, centered
        self.layers, self.attention, self.levels = layers, attention, len(widths)
        self.register_buffer("sigmas", torch.ones(5))
        parts: list[nn.Module] = [nn.Linear(width, emb), nn.Linear(emb, emb)]
        parts.append(nn.Conv2d(3, width, 3, padding=1))
        now, skips = width, [width]
        for level, out in enumerate(widths):
            for _ in range(layers):
                parts.append(SdeRes(now, out, emb))
                now = out
                skips.append(now)
                parts += [SdeAttention(now)] if level in attention else []
            if level + 1 < len(widths):
                parts.append(SdeConv(now, up=False))
                skips.append(now)
        parts += [SdeRes(now, now, emb), SdeAttention(now), SdeRes(now, now, emb)]
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(layers + 1):
                parts.append(SdeRes(now + skips.pop(), out, emb))
                now = out
            parts += [SdeAttention(now)] if level in attention else []
            parts += [SdeConv(now, up=True)] if level else []
        parts += [norm(now), nn.Conv2d(now, 3, 3, padding=1)]
        self.all_modules = nn.ModuleList(parts)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        parts = iter(self.all_modules)
        call: Callable[..., Tensor] = lambda *args: next(parts)(*args)  # noqa: E731
        emb = call(features(t, self.width))
        emb = call(F.silu(emb))
        skips = [x := call(x if self.centered else 2 * x - 1)]
        for level in range(self.levels):
            for _ in range(self.layers):
                x = call(x, emb)
                x = call(x) if level in self.attention else x
                skips.append(x)
            if level + 1 < self.levels:
                skips.append(x := call(x))
        x = call(call(call(x, emb)), emb)
        for level in reversed(range(self.levels)):
            for _ in range(self.layers + 1):
                x = call(torch.cat([x, skips.pop()], dim=1), emb)
            x = call(x) if level in self.attention else x
            x = call(x) if level else x
        return call(F.silu(call(x)))
