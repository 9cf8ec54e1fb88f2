"""Down- and upsampling between the levels of a U-Net, by a factor of 2.

A kernel of height 1 is that of a signal, an image with one row: only the width is resampled.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops


def convolution(in_channels: int, out_channels: int, kernel: tuple[int, int]) -> nn.Conv2d:
    """A convolution that keeps height and width; the kernel's are odd."""
    padding = kernel[0] // 2, kernel[1] // 2
    return nn.Conv2d(in_channels, out_channels, kernel, padding=padding)


def factors(kernel: tuple[int, int]) -> tuple[int, int]:
    """By how much height and width are resampled between levels with convolutions of ``kernel``."""
    return (1 if kernel[0] == 1 else 2), 2


class Downsample2D(nn.Module):
    """A convolution with stride 2.

    Args:
        channels: C, of input and output.
        padding: 1 pads every side by one; 0 pads the right and the bottom by one (as in DDPM).
        kernel: (3, 3), or (1, 3) to halve the width alone.
    """

    def __init__(self, channels: int, padding: int, kernel: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        stride = factors(kernel)
        sides = padding * (kernel[0] // 2), padding
        self.conv = nn.Conv2d(channels, channels, kernel, stride=stride, padding=sides)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H / 2, W / 2], H and W even; H stays if the kernel is (1, 3)."""
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, self.conv.kernel_size[0] // 2))
        return self.conv(x)


class NearestUpsample2x(nn.Module):
    """Nearest-neighbour upsampling by a factor of 2.

    Args:
        kernel: of the convolutions around it; with (1, 3) the width alone is doubled.
    """

    def __init__(self, kernel: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        self.factors = factors(kernel)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2 H, 2 W], or [N, C, H, 2 W]."""
        if self.factors == (2, 2):
            return ops.upsample_nearest2x(x)
        return F.interpolate(x, scale_factor=(1.0, 2.0), mode="nearest")


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling, then a convolution.

    Args:
        channels: C, of input and output.
        kernel: (3, 3), or (1, 3) to double the width alone.
    """

    def __init__(self, channels: int, kernel: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        self.upsample = NearestUpsample2x(kernel)
        self.conv = convolution(channels, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2 H, 2 W]; H stays if the kernel is (1, 3)."""
        return self.conv(self.upsample(x))
