"""The residual block of the U-Net."""

from __future__ import annotations

from torch import Tensor, nn

from fastdiff.nn.norm import GroupNormSiLU
from fastdiff.nn.resample import NearestUpsample2x, convolution, factors


class ResnetBlock2D(nn.Module):
    """Norm, SiLU, convolution, twice, with the time embedding between, plus a shortcut.

    The caller projects the embedding, so that a sampling loop can do it once for all its steps:
    ``block(x, block.time_emb_proj(temb))``, with temb [N, D] after its SiLU.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        temb_channels: D, length of the time embedding.
        groups: groups of both norms.
        eps: added to the variance in both norms.
        dropout: probability of dropout before the second convolution.
        scale_shift: the embedding scales and shifts the second norm's output (ADM,
            arXiv:2105.05233, eq. 3); otherwise it is added to that norm's input (DDPM).
        output_scale_factor: divisor of the residual sum.
        up: double the resolution by nearest-neighbour upsampling.
        down: halve the resolution by averaging.
        kernel: of both convolutions; with (1, 3) only the width is resampled.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int,
        groups: int,
        eps: float,
        dropout: float = 0.0,
        scale_shift: bool = False,
        output_scale_factor: float = 1.0,
        up: bool = False,
        down: bool = False,
        kernel: tuple[int, int] = (3, 3),
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.output_scale_factor = output_scale_factor
        self.norm1 = GroupNormSiLU(groups, in_channels, eps)
        self.conv1 = convolution(in_channels, out_channels, kernel)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNormSiLU(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = convolution(out_channels, out_channels, kernel)
        self.resample: nn.Module = nn.Identity()
        if up:
            self.resample = NearestUpsample2x(kernel)
        elif down:
            self.resample = nn.AvgPool2d(factors(kernel))
        self.conv_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: [N, C_in, H, W].
            emb: the result of ``time_emb_proj``, [N, C_out], or [N, 2 C_out] with scale_shift; or
                one row for the whole batch.

        Returns:
            [N, C_out, H', W'], where H' is H, 2 H (up) or H / 2 (down), and with a kernel (1, 3) H.
        """
        h = self.conv1(self.resample(self.norm1(x)))
        if emb.shape[0] != x.shape[0]:
            emb = emb.expand(x.shape[0], -1)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h, scale=scale, shift=shift)
        else:
            h = self.norm2(h, add=emb)
        h = self.conv2(self.dropout(h))
        out = self.conv_shortcut(self.resample(x)) + h
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor
