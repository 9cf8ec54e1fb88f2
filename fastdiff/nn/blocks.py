"""The levels of the U-Net: residual blocks, each with attention or without, and resampling.

There is one class for the way down, one for the middle and one for the way up. diffusers' block
types differ only in their parts, which the callables ``resnet(in_channels, out_channels)`` and
``attention(channels)`` make.

``embs`` holds the projected time embeddings [N, C] (or [1, C] for the whole batch), one for each of
a level's ``residual_blocks``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastdiff.nn.resnet import ResnetBlock2D

Make = Callable[..., nn.Module]


class Level(nn.Module):
    """Base class of the levels, whose children are lists of parts in the order of the calls."""

    @property
    def residual_blocks(self) -> list[ResnetBlock2D]:
        """The level's residual blocks in the order of the calls, a resampling one included."""
        parts = (part for group in self.children() for part in group.children())
        return [part for part in parts if isinstance(part, ResnetBlock2D)]


class DownBlock2D(Level):
    """A level on the way down.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the level.
        layers: number of residual blocks.
        resnet: makes a residual block.
        attention: makes an attention module, or nn.Identity.
        downsampler: a module that halves the resolution; None on the last level.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        layers: int,
        resnet: Make,
        attention: Make,
        downsampler: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * (layers - 1)]
        self.resnets = nn.ModuleList(resnet(width, out_channels) for width in widths)
        self.attentions = nn.ModuleList(attention(out_channels) for _ in widths)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Tensor, embs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """x [N, C, H, W] -> the level's output, and the tensors that ``UpBlock2D`` will read."""
        skips = []
        count = len(self.resnets)
        for resnet, attention, emb in zip(self.resnets, self.attentions, embs[:count], strict=True):
            x = attention(resnet(x, emb))
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, *embs[count:])  # only a residual block takes an embedding
            skips.append(x)
        return x, skips


class UNetMidBlock2D(Level):
    """The middle: a residual block, attention, and another residual block."""

    def __init__(self, channels: int, *, resnet: Make, attention: Make) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([attention(channels)])

    def forward(self, x: Tensor, embs: Sequence[Tensor]) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        x = self.attentions[0](self.resnets[0](x, embs[0]))
        return self.resnets[1](x, embs[1])


class UpBlock2D(Level):
    """A level on the way up; each residual block also reads a skip, a tensor of the way down.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the level.
        skip_channels: channels of the skip of each residual block.
        resnet: makes a residual block.
        attention: makes an attention module, or nn.Identity.
        upsampler: a module that doubles the resolution; None on the last level.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        skip_channels: Sequence[int],
        *,
        resnet: Make,
        attention: Make,
        upsampler: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * (len(skip_channels) - 1)]
        self.resnets = nn.ModuleList(
            resnet(width + skip, out_channels)
            for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.attentions = nn.ModuleList(attention(out_channels) for _ in widths)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, x: Tensor, skips: Sequence[Tensor], embs: Sequence[Tensor]) -> Tensor:
        """x [N, C, H, W] -> the level's output; the last of ``skips`` is read first."""
        count = len(self.resnets)
        for resnet, attention, skip, emb in zip(
            self.resnets, self.attentions, reversed(skips), embs[:count], strict=True
        ):
            x = attention(resnet(torch.cat([x, skip], dim=1), emb))
        for upsampler in self.upsamplers:
            x = upsampler(x, *embs[count:])
        return x
