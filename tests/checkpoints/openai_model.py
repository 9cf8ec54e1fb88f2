"""A U-Net in the manner of guided-diffusion, with the names of its weights and all its options."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels)


class Up(nn.Module):
    def __init__(self, channels: int, learned: bool = True) -> None:
        super().__init__()
        if learned:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class Down(nn.Module):
    def __init__(self, channels: int, learned: bool = True) -> None:
        super().__init__()
        if learned:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x) if hasattr(self, "op") else F.avg_pool2d(x, 2)


class Res(nn.Module):
    def __init__(
        self,
        channels: int,
        out: int,
        emb: int,
        scale_shift: bool,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()  # without weights
        self.in_layers = nn.Sequential(
            norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            norm(out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection: nn.Module = nn.Identity()
        if channels != out:
            self.skip_connection = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        first, act, conv = self.in_layers
        h = conv(self.resample(act(first(x))))
        e = self.emb_layers(emb)[:, :, None, None]
        second, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = second(h) * (1 + scale) + shift
        else:
            h = second(h + e)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))  # [N, 3 C, H W]
        if self.new_order:
            q, k, v = (part.unflatten(1, (self.heads, -1)) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)
        scores = torch.einsum("nhct,nhcs->nhts", q, k) / math.sqrt(c // self.heads)
        h = torch.einsum("nhts,nhcs->nhct", scores.softmax(-1), v).flatten(1, 2)
        return (flat + self.proj_out(h)).view(n, c, *x.shape[2:])


class Stage(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, Res) else layer(x)
        return x


class OpenAIUNet(nn.Module):
    def __init__(
        self,
        width: int = 32,
        multipliers: Sequence[float] = (1, 2),
        *,
        layers: int = 1,
        attention: Sequence[int] = (1,),
        num_heads: int = 1,
        num_head_channels: int | None = None,
        new_order: bool = False,
        scale_shift: bool = False,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        classes: int | None = None,
        channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        emb = 4 * width
        widths = [int(multiplier * width) for multiplier in multipliers]
        last = len(widths) - 1
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, emb)

        def attend(channels: int) -> Attention:
            heads = channels // num_head_channels if num_head_channels else num_heads
            return Attention(channels, heads, new_order)

        def change(channels: int, kind: type[Up] | type[Down]) -> nn.Module:
            if resblock_updown:
                return Res(channels, channels, emb, scale_shift, kind(channels, learned=False))
            return kind(channels, learned=conv_resample)

        down: list[nn.Module] = [Stage(nn.Conv2d(channels, widths[0], 3, padding=1))]
        now, skips = widths[0], [widths[0]]
        for level, out in enumerate(widths):
            for _ in range(layers):
                stage = [Res(now, out, emb, scale_shift)]
                stage += [attend(out)] if level in attention else []
                down.append(Stage(*stage))
                now = out
                skips.append(now)
            if level < last:
                down.append(Stage(change(now, Down)))
                skips.append(now)
        self.input_blocks = nn.ModuleList(down)
        self.middle_block = Stage(
            Res(now, now, emb, scale_shift), attend(now), Res(now, now, emb, scale_shift)
        )
        up: list[nn.Module] = []
        for level, out in reversed(list(enumerate(widths))):
            for index in range(layers + 1):
                stage = [Res(now + skips.pop(), out, emb, scale_shift)]
                now = out
                stage += [attend(out)] if level in attention else []
                stage += [change(out, Up)] if level and index == layers else []
                up.append(Stage(*stage))
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(
            norm(now), nn.SiLU(), nn.Conv2d(widths[0], out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        angles = t.float()[:, None] * rates
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, its weights all drawn, so that no layer is left at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.data = noise / math.sqrt(fan_in) + (parameter.ndim == 1)
    return model.eval()
