"""Self-attention over the pixels of a feature map."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

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

    def attended(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """``forward`` with another function of queries, keys and values.

        Args:
            x: [N, C, H, W].
            attend: (q, k, v), each [N, heads, H W, head_dim] -> like v.
        """
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [N, H W, C]
        q, k, v = (
            project(h).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [N, heads, H W, head_dim]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        h = attend(q, k, v)
        h = self.to_out[0](h.transpose(1, 2).flatten(2))  # [N, H W, C]
        out = x + h.transpose(1, 2).unflatten(2, x.shape[2:])
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor
