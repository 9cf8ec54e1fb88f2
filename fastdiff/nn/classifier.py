"""A classifier of noised images: the U-Net's way down and middle, then a mean over all pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.common.checks import wide_dtype
from fastdiff.nn import unet_parts
from fastdiff.nn.config import UNet2DConfig
from fastdiff.nn.input_checks import as_timesteps, check_sample
from fastdiff.nn.norm import GroupNormSiLU


class NoisyClassifier(nn.Module):
    """Classifies x_t at any noise level (Dhariwal & Nichol 2021, arXiv:2105.05233, sec. 4).

    The down-sampling half and the middle of the U-Net, then the mean over all pixels and a linear
    layer. In some processes noised images are as large as their noise, up to 80 in EDM; so each
    image is first divided by sqrt(1 + its mean square).

    Args:
        num_classes: K.
        **options: see :class:`UNet2DConfig`; options of the way up and of class labels are unused.

    Attributes:
        num_classes: K.
        config: the options, a frozen :class:`UNet2DConfig`.

    Raises:
        ValueError: fewer than 2 classes, an unknown option, or a value that is not supported.

    Example:
        >>> classifier = fastdiff.nn.NoisyClassifier(
        ...     10,
        ...     in_channels=1,
        ...     block_out_channels=(32, 64),
        ...     down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        ...     up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ... )
        >>> classifier(torch.randn(4, 1, 28, 28), 10).shape
        torch.Size([4, 10])
    """

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.config = config = UNet2DConfig.from_dict(options)
        width = config.block_out_channels[-1]
        self.conv_in = nn.Conv2d(config.in_channels, config.block_out_channels[0], 3, padding=1)
        self.time_proj = unet_parts.time_projection(config)
        self.time_embedding = unet_parts.time_embedding(config)
        self.down_blocks = nn.ModuleList(unet_parts.down_blocks(config))
        self.mid_block = unet_parts.mid_block(config)
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, width, config.norm_eps)
        self.head = nn.Linear(width, num_classes)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.conv_in.weight.device

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Logits of noised images.

        Args:
            x: [N, in_channels, H, W]; H and W divisible by 2 ** (number of levels - 1).
            t: the time as the diffusion network is given it: a number, or a tensor [N], or [1] or
                [] for the whole batch.

        Returns:
            [N, K].

        Raises:
            ValueError: shapes that do not fit.
        """
        check_sample(x, self.config)
        rows = self.config.num_train_timesteps
        learned = self.config.time_embedding_type == "learned"
        times = as_timesteps(t, self.device, rows if learned else None)
        if len(times) not in (1, len(x)):
            raise ValueError(
                f"t must have 1 element or {len(x)}, one an image, got {tuple(times.shape)}"
            )
        features = self.time_proj(times).to(self.conv_in.weight.dtype)
        temb = F.silu(self.time_embedding(features))
        power = x.to(wide_dtype(x.dtype)).square().mean((1, 2, 3), keepdim=True)
        h = self.conv_in(x * (1 + power).rsqrt().to(x.dtype))
        for block in self.down_blocks:
            h, _ = block(h, _projected(block, temb))
        if self.mid_block is not None:
            h = self.mid_block(h, _projected(self.mid_block, temb))
        return self.head(self.conv_norm_out(h).mean((2, 3)))


def _projected(level: Any, temb: Tensor) -> list[Tensor]:
    """The time embedding as each residual block of a level takes it, [N or 1, C] each."""
    return [block.time_emb_proj(temb) for block in level.residual_blocks]
