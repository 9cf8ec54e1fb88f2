"""From timesteps to the embedding that conditions every residual block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SinusoidalProjection(nn.Module):
    """Sines and cosines of t at geometrically spaced frequencies (DDPM, appendix B).

    Args:
        channels: length of the result; an odd one ends in a zero.
        flip_sin_to_cos: cosines before sines.
        freq_shift: 1 makes the lowest frequency exactly 1/10000, 0 leaves it just above.
    """

    def __init__(self, channels: int, *, flip_sin_to_cos: bool, freq_shift: float) -> None:
        super().__init__()
        self.channels = channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.freq_shift = freq_shift

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps [N], of any real dtype -> [N, channels], float32."""
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(10_000) * steps / (half - self.freq_shift))
        angles = t[:, None].float() * frequencies
        sin, cos = angles.sin(), angles.cos()
        waves = torch.cat([cos, sin] if self.flip_sin_to_cos else [sin, cos], dim=1)
        return F.pad(waves, (0, self.channels % 2))


class FourierProjection(nn.Module):
    """Sines and cosines of log t at random, fixed frequencies (score_sde, arXiv:2011.13456).

    Args:
        channels: number of frequencies; the result is twice as long.
        scale: standard deviation of the frequencies.
    """

    def __init__(self, channels: int, *, scale: float = 16.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels) * scale, requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        """Positive noise levels [N] -> [N, 2 * channels]."""
        if not t.is_floating_point():  # log of integers would have torch's default dtype
            t = t.float()
        # Angles reach 1e3, so the order of these products changes the fifth decimal of sin and cos.
        angles = t.log()[:, None] * self.weight * 2 * math.pi
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU in between: [N, in_channels] -> [N, channels]."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels] -> [N, channels]."""
        return self.linear_2(F.silu(self.linear_1(x)))


@dataclass(frozen=True, eq=False)
class Precomputed:
    """The embeddings of a sampling loop's timesteps and class labels, for all steps at once.

    Attributes:
        rows: [S, U, P]: for each of S timesteps and U distinct labels (1 without labels) the
            projected embeddings of every residual block, concatenated.
        index: int64 [N], which of the U rows each image takes; None if there is one row for the
            whole batch, or one for each image in order.
        needs_time: whether the model also needs the timestep: a model with fourier embeddings
            divides its output by it.
    """

    rows: Tensor
    index: Tensor | None = None
    needs_time: bool = False

    def at(self, step: int | Tensor) -> Tensor:
        """The rows of one step, [N, P], or [1, P] for the whole batch.

        Args:
            step: 0..S-1. As an int64 tensor of one element it stays on its device, so that a CUDA
                graph can be captured with it and replayed for every step.
        """
        rows = self.rows.index_select(0, step)[0] if isinstance(step, Tensor) else self.rows[step]
        return rows if self.index is None else rows.index_select(0, self.index)


def distinct(labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Labels [N, ...] without repetitions, [U, ...], and the ``index`` of :class:`Precomputed`."""
    rows, index = torch.unique(labels, dim=0, return_inverse=True)
    if len(rows) == 1:
        return rows, None
    return (labels, None) if len(rows) == len(labels) else (rows, index)
