"""channel_statistics and group_norm_coefficients against the mean and variance of PyTorch."""

from __future__ import annotations

import torch
from comparison import every_dtype, every_shape
from torch import Tensor

from fastdiff import ops

GROUPS = 32


@every_dtype
@every_shape((8, 128, 32, 32), (2, 320, 64, 64))
def bench_group_norm_coefficients(versus, shape, dtype) -> None:
    """Both of a channels-last tensor, as the compiler has them for a norm after another layer."""
    x = torch.randn(shape).to(dtype, memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1]).to(dtype)

    def ours() -> Tensor:
        return ops.group_norm_coefficients([ops.channel_statistics(x)], GROUPS, weight, bias)

    def theirs() -> Tensor:
        wide = x.float().permute(0, 2, 3, 1).unflatten(3, (GROUPS, -1))
        variance, mean = torch.var_mean(wide, dim=(1, 2, 4), correction=0)
        scale = torch.rsqrt(variance + 1e-5).repeat_interleave(shape[1] // GROUPS, dim=1)
        gain = scale * weight.float()
        offset = bias.float() - mean.repeat_interleave(shape[1] // GROUPS, dim=1) * gain
        return torch.stack((gain, offset), dim=1)

    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
    versus(ours, {"torch": theirs})
