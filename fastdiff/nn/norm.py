"""GroupNorm with its activation, as one fused operation."""

from __future__ import annotations

from torch import Tensor, nn

from fastdiff import ops


class GroupNormSiLU(nn.GroupNorm):
    """silu(GroupNorm(x + add) * (1 + scale) + shift), with the parameters of nn.GroupNorm.

    Args:
        num_groups: groups that share statistics; must divide ``num_channels``.
        num_channels: C.
        eps: added to the variance.
        silu: apply the activation; False for the norm before attention.
    """

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, *, silu: bool = True
    ) -> None:
        super().__init__(num_groups, num_channels, eps)
        self.silu = silu

    def forward(
        self,
        input: Tensor,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Normalise and activate.

        Args:
            input: [N, C, H, W], floating point.
            add: [N, C], added to every pixel before the statistics are computed.
            scale: [N, C], the normalised value is multiplied by 1 + scale.
            shift: [N, C], added after the scale.

        Returns:
            [N, C, H, W] in the dtype of ``input``. Under autocast that dtype is narrower than the
            parameters'; then the parameters are converted, not the activations.
        """
        dtype = input.dtype
        return ops.group_norm_silu(
            input,
            self.num_groups,
            self.weight.to(dtype),
            self.bias.to(dtype),
            self.eps,
            add=None if add is None else add.to(dtype),
            scale=None if scale is None else scale.to(dtype),
            shift=None if shift is None else shift.to(dtype),
            silu=self.silu,
        )
