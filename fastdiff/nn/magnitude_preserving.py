"""Layers that keep the magnitude of activations, as EDM2's network is made of.

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models",
arXiv:2312.02696. The magnitude of a tensor is the root of the mean of its squares. Each layer gives
a result of magnitude 1 for independent inputs of magnitude 1, so that no norm of the activations
and no bias is needed. The equations are those of the paper's appendix B.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-4  # added to a magnitude before something is divided by it
SILU_MAGNITUDE = 0.596  # of SiLU of a standard normal variable


def normalised(x: Tensor, *dims: int) -> Tensor:
    """x, divided by its magnitude over ``dims``; in the dtype of x."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    magnitude = wide.square().mean(dims, keepdim=True).sqrt()
    return (wide / (magnitude + EPS)).to(x.dtype)


def pixel_norm(x: Tensor) -> Tensor:
    """Images [N, C, H, W] whose every pixel has magnitude 1 (eq. 30)."""
    return normalised(x, 1)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over its magnitude (eq. 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """The sum of (1 - balance) a and balance b, over its magnitude (eq. 88)."""
    return torch.lerp(a, b, balance) / math.hypot(1 - balance, balance)


def mp_cat(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """Images [N, A, H, W] and [N, B, H, W], concatenated: a's share of what the next layer computes
    is 1 - balance and b's is balance, whichever has more channels (eq. 103).
    """
    size_a, size_b = a.shape[1], b.shape[1]
    whole = math.sqrt((size_a + size_b) / ((1 - balance) ** 2 + balance**2))
    of_a = whole / math.sqrt(size_a) * (1 - balance)
    of_b = whole / math.sqrt(size_b) * balance
    return torch.cat([a * of_a, b * of_b], dim=1)


class MPFourier(nn.Module):
    """Cosines of a number at random, fixed frequencies and phases (eq. 75).

    Args:
        channels: length of the result.
        scale: factor of the number.
    """

    def __init__(self, channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        turn = 2 * math.pi
        self.frequencies = nn.Parameter(turn * torch.randn(channels), requires_grad=False)
        self.phases = nn.Parameter(turn * torch.rand(channels), requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        """Numbers [N], of any real dtype -> [N, channels], float32."""
        angles = (t.float() * self.scale)[:, None] * self.frequencies.float() + self.phases.float()
        return angles.cos() * math.sqrt(2)


class MPWeight(nn.Module):
    """Base class of the layers with a weight, which counts only by its direction.

    The weight of each output channel is divided by its magnitude whenever it is used (eq. 47). In
    training :meth:`normalise` also does this to the parameter itself, after each update: otherwise
    it would grow, and the same update would turn it less and less (eq. 66).

    Args:
        shape: of the weight, [K, C, ...].
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def scaled(self, gain: Tensor | float = 1.0) -> Tensor:
        """The weight that preserves magnitudes, times ``gain``, in the parameter's dtype."""
        dims = tuple(range(1, self.weight.ndim))
        return normalised(self.weight, *dims) * (gain / math.sqrt(self.weight[0].numel()))

    @torch.no_grad()
    def normalise(self) -> None:
        """Divide the parameter by its magnitude for each output channel."""
        self.weight.copy_(normalised(self.weight, *range(1, self.weight.ndim)))


class MPLinear(MPWeight):
    """A linear layer without bias, [..., C] -> [..., K]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(out_channels, in_channels)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """[..., C] -> [..., K], times ``gain``."""
        return F.linear(x, self.scaled(gain))


class MPConv2d(MPWeight):
    """A convolution without bias, [N, C, H, W] -> [N, K, H, W].

    Args:
        in_channels: C.
        out_channels: K.
        kernel: height and width of the weight, odd; the input is padded by zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(out_channels, in_channels, kernel, kernel)
        self.padding = kernel // 2

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """[N, C, H, W] -> [N, K, H, W], times ``gain``."""
        return F.conv2d(x, self.scaled(gain), padding=self.padding)


class MPEmbedding(MPWeight):
    """A row for each class: an :class:`MPLinear` layer of the labels as vectors of magnitude 1.

    Such a vector is sqrt(classes) at the place of the class and 0 elsewhere. So the weight of a
    channel is over all classes, and its magnitude too.

    Args:
        classes: number of rows.
        channels: D, their length.
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__(channels, classes)

    def forward(self, labels: Tensor) -> Tensor:
        """int64 [N] -> [N, D]."""
        return F.embedding(labels, normalised(self.weight, 1).t())
