"""The blocks of EDM2's network (Karras et al. 2024, arXiv:2312.02696, figure 21, config G)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.nn.magnitude_preserving import (
    MPConv2d,
    MPLinear,
    mp_silu,
    mp_sum,
    normalised,
    pixel_norm,
)


class CosineAttention(nn.Module):
    """Self-attention over the pixels, whose queries, keys and values have magnitude 1.

    Args:
        channels: C.
        head_dim: channels of a head, a divisor of C.
        balance: of the sum with the input, see ``mp_sum``.
    """

    def __init__(self, channels: int, *, head_dim: int, balance: float) -> None:
        super().__init__()
        self.heads, self.balance = channels // head_dim, balance
        self.qkv = MPLinear(channels, 3 * channels)  # outputs [3, heads, head_dim]
        self.out = MPLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        rows = self.qkv(x.flatten(2).transpose(1, 2))  # [N, H W, 3 C]
        rows = normalised(rows.unflatten(2, (3, self.heads, -1)), -1)
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, H W, head_dim]
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.out(h.transpose(1, 2).flatten(2))  # [N, H W, C]
        return mp_sum(x, h.transpose(1, 2).unflatten(2, x.shape[2:]), self.balance)


class KarrasBlock(nn.Module):
    """Base class of the blocks: two 3x3 convolutions beside a shortcut, and attention.

    The embedding multiplies each channel between the convolutions, instead of a norm there.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        embedding_channels: D, length of the embedding.
        dropout: probability of dropout before the second convolution.
        balance: of the sum of shortcut and convolutions, see ``mp_sum``.
        attention: a module that is applied to the result, or nn.Identity.
        clip: the result is clipped to +-clip; None for no clipping. In float16 it prevents an
            overflow; activations of a trained network are far below it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        dropout: float,
        balance: float,
        attention: nn.Module,
        clip: float | None,
    ) -> None:
        super().__init__()
        self.balance, self.clip = balance, clip
        self.conv1 = MPConv2d(in_channels, out_channels, 3)
        self.embedding = MPLinear(embedding_channels, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = MPConv2d(out_channels, out_channels, 3)
        self.attention = attention

    def _merged(self, shortcut: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        """The block of x, beside a shortcut."""
        h = self.conv1(mp_silu(x)) * gain[:, :, None, None]
        h = self.conv2(self.dropout(mp_silu(h)))
        h = self.attention(mp_sum(shortcut, h, self.balance))
        return h if self.clip is None else h.clamp(-self.clip, self.clip)


class EncoderBlock(KarrasBlock):
    """A block of the way down, which gives each pixel of its input magnitude 1.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        down: halve the resolution by averaging.
        **options: see :class:`KarrasBlock`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, down: bool, **options: object):
        super().__init__(out_channels, out_channels, **options)  # type: ignore[arg-type]
        self.resample: nn.Module = nn.AvgPool2d(2) if down else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = MPConv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        """x [N, C_in, H, W] and a gain [N or 1, C_out] -> [N, C_out, H', W']."""
        x = pixel_norm(self.shortcut(self.resample(x)))
        return self._merged(x, x, gain)


class DecoderBlock(KarrasBlock):
    """A block of the way up.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        up: double the resolution by nearest-neighbour upsampling.
        **options: see :class:`KarrasBlock`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, up: bool, **options: object):
        super().__init__(in_channels, out_channels, **options)  # type: ignore[arg-type]
        self.up = up
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = MPConv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        """x [N, C_in, H, W] and a gain [N or 1, C_out] -> [N, C_out, H', W']."""
        if self.up:
            x = ops.upsample_nearest2x(x)
        return self._merged(self.shortcut(x), x, gain)
