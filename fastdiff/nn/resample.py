"""Down- and upsampling between the levels of a U-Net, by a factor of 2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops


class Downsample2D(nn.Module):
    """A 3x3 convolution with stride 2.

    Args:
        channels: C, of input and output.
        padding: 1 pads every side by one; 0 pads the right and the bottom by one (as in DDPM).
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H / 2, W / 2], H and W even."""
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class NearestUpsample2x(nn.Module):
    """Nearest-neighbour upsampling by a factor of 2."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2 H, 2 W]."""
        return ops.upsample_nearest2x(x)


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling, then a 3x3 convolution.

    Args:
        channels: C, of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2 H, 2 W]."""
        return self.conv(ops.upsample_nearest2x(x))
