"""Self-attention over the pixels of a feature map, or over the frames of a video."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.nn.embeddings import SinusoidalProjection
from fastdiff.nn.norm import GroupNormSiLU


class Attention(nn.Module):
    """Multi-head self-attention with a residual connection.

    Args:
        channels: C.
        head_dim: channels of a head; None for a single head. There are C // head_dim heads. If
            head_dim does not divide C, queries, keys and values have fewer than C channels.
        groups: groups of the norm before the projections; None for no norm.
        eps: added to the variance in that norm.
        output_scale_factor: divisor of the residual sum.
    """

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int | None,
        groups: int | None,
        eps: float,
        output_scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        head_dim = head_dim or channels
        self.heads = channels // head_dim
        self.output_scale_factor = output_scale_factor
        inner = self.heads * head_dim
        self.group_norm: nn.Module = nn.Identity()
        if groups is not None:
            self.group_norm = GroupNormSiLU(groups, channels, eps, silu=False)
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W], in x's memory format."""
        return self.attended(x, F.scaled_dot_product_attention)

    def attended(
        self,
        x: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        **added: Tensor,
    ) -> Tensor:
        """``forward`` with another function of queries, keys and values.

        Args:
            x: [N, C, H, W].
            attend: (q, k, v), each [N, heads, H W, head_dim] -> like v.
            added: keyword arguments of the norm.
        """
        h = self.group_norm(x, **added).flatten(2).transpose(1, 2)  # [N, H W, C]
        q, k, v = (
            project(h).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [N, heads, H W, head_dim]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        h = attend(q, k, v)
        h = self.to_out[0](h.transpose(1, 2).flatten(2))  # [N, H W, C]
        out = x + h.transpose(1, 2).unflatten(2, x.shape[2:])
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor


class FrameAttention(Attention):
    """Each pixel's self-attention over the frames of its video (arXiv:2204.03458, section 3).

    Sinusoidal embeddings of the frames' numbers are added to what queries, keys and values are
    computed from, so that the number of frames is free. The last layer begins with zeros: a model
    that takes over the weights of a model of images first computes the same for every frame.

    Args:
        channels: C.
        options: of :class:`Attention`; ``groups`` must be a number.
    """

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.positions = SinusoidalProjection(channels, flip_sin_to_cos=False, freq_shift=0)
        for parameter in self.to_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, frames: int = 1) -> Tensor:
        """[N F, C, H, W] -> [N F, C, H, W], F = ``frames`` being next to each other."""
        positions = self.positions(torch.arange(frames, device=x.device))  # [F, C]
        shift = positions.expand(x.shape[0] // frames, -1, -1).flatten(0, 1)
        return self.attended(x, partial(_over_frames, frames=frames), shift=shift)


def _over_frames(q: Tensor, k: Tensor, v: Tensor, *, frames: int) -> Tensor:
    """Attention of q, k, v [N F, heads, H W, head_dim] over the frames of each pixel -> like v."""
    pixels = q.shape[2]

    def by_pixel(x: Tensor) -> Tensor:  # [N H W, heads, F, head_dim]
        return x.unflatten(0, (-1, frames)).permute(0, 3, 2, 1, 4).flatten(0, 1)

    out = F.scaled_dot_product_attention(by_pixel(q), by_pixel(k), by_pixel(v))
    return out.unflatten(0, (-1, pixels)).permute(0, 3, 2, 1, 4).flatten(0, 1)
