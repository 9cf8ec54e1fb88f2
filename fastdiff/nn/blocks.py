"""The levels of the U-Net: residual blocks, each with attention or without, and resampling.

There is one class for the way down, one for the middle and one for the way up. diffusers' block
types differ only in their parts, which the callables ``resnet(in_channels, out_channels)`` and
``attention(channels)`` make.

``embs`` holds the projected time embeddings [N, C] (or [1, C] for the whole batch), one for each of
a level's ``residual_blocks``. Levels of a model of videos have attention over frames too, which
``frame_attention`` makes: their images are the ``frames`` frames of each video in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastdiff.nn.resnet import ResnetBlock2D

Make = Callable[..., nn.Module]


class Level(nn.Module):
    """Base class of the levels, whose children are lists of parts in the order of the calls.

    ``frame_attentions`` is empty, or has one for each of ``attentions``.
    """

    attentions: nn.ModuleList
    frame_attentions: nn.ModuleList

    @property
    def residual_blocks(self) -> list[ResnetBlock2D]:
        """The level's residual blocks in the order of the calls, a resampling one included."""
        parts = (part for group in self.children() for part in group.children())
        return [part for part in parts if isinstance(part, ResnetBlock2D)]

    def _set_attentions(
        self, channels: int, count: int, attention: Make, frame_attention: Make | None
    ) -> None:
        self.attentions = nn.ModuleList(attention(channels) for _ in range(count))
        of_frames = 0 if frame_attention is None else count
        make: Make = frame_attention or nn.Identity
        self.frame_attentions = nn.ModuleList(make(channels) for _ in range(of_frames))

    def _attend(self, number: int, x: Tensor, frames: int) -> Tensor:
        x = self.attentions[number](x)
        return self.frame_attentions[number](x, frames) if self.frame_attentions else x


class DownBlock2D(Level):
    """A level on the way down.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the level.
        layers: number of residual blocks.
        resnet: makes a residual block.
        attention: makes an attention module, or nn.Identity.
        frame_attention: makes attention over frames, or None.
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
        frame_attention: Make | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * (layers - 1)]
        self.resnets = nn.ModuleList(resnet(width, out_channels) for width in widths)
        self._set_attentions(out_channels, len(widths), attention, frame_attention)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(
        self, x: Tensor, embs: Sequence[Tensor], frames: int = 1
    ) -> tuple[Tensor, list[Tensor]]:
        """x [N, C, H, W] -> the level's output, and the tensors that ``UpBlock2D`` will read."""
        skips = []
        count = len(self.resnets)
        for number, (resnet, emb) in enumerate(zip(self.resnets, embs[:count], strict=True)):
            x = self._attend(number, resnet(x, emb), frames)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, *embs[count:])  # only a residual block takes an embedding
            skips.append(x)
        return x, skips


class UNetMidBlock2D(Level):
    """The middle: a residual block, attention, and another residual block."""

    def __init__(
        self,
        channels: int,
        *,
        resnet: Make,
        attention: Make,
        frame_attention: Make | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnet(channels, channels) for _ in range(2))
        self._set_attentions(channels, 1, attention, frame_attention)

    def forward(self, x: Tensor, embs: Sequence[Tensor], frames: int = 1) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        x = self._attend(0, self.resnets[0](x, embs[0]), frames)
        return self.resnets[1](x, embs[1])


class UpBlock2D(Level):
    """A level on the way up; each residual block also reads a skip, a tensor of the way down.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the level.
        skip_channels: channels of the skip of each residual block.
        resnet: makes a residual block.
        attention: makes an attention module, or nn.Identity.
        frame_attention: makes attention over frames, or None.
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
        frame_attention: Make | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * (len(skip_channels) - 1)]
        self.resnets = nn.ModuleList(
            resnet(width + skip, out_channels)
            for width, skip in zip(widths, skip_channels, strict=True)
        )
        self._set_attentions(out_channels, len(widths), attention, frame_attention)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(
        self, x: Tensor, skips: Sequence[Tensor], embs: Sequence[Tensor], frames: int = 1
    ) -> Tensor:
        """x [N, C, H, W] -> the level's output; the last of ``skips`` is read first."""
        count = len(self.resnets)
        for number, (resnet, skip, emb) in enumerate(
            zip(self.resnets, reversed(skips), embs[:count], strict=True)
        ):
            x = self._attend(number, resnet(torch.cat([x, skip], dim=1), emb), frames)
        for upsampler in self.upsamplers:
            x = upsampler(x, *embs[count:])
        return x
