"""Every operation in plain PyTorch: what the kernels are checked against, and the fallback.

Written for clarity; statistics and sums are taken in float32 or better and the result is stored in
the input's dtype, which is also what the kernels promise. Arguments are those of ``fastdiff.ops``,
already checked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
) -> Tensor:
    """y = silu(group_norm(x + add) * (1 + scale) + shift) + residual."""
    if add is not None:
        x = x + _per_channel(add, x)
    if weight is None and bias is not None:  # PyTorch's backward fails on this combination
        weight = torch.ones_like(bias)
    h = torch.group_norm(x, num_groups, weight, bias, eps)  # F.group_norm refuses single values
    if scale is not None:
        h = h * (1 + _per_channel(scale, h))
    if shift is not None:
        h = h + _per_channel(shift, h)
    if silu:
        h = F.silu(h)
    return h if residual is None else h + residual


def add_time_embedding(x: Tensor, emb: Tensor) -> Tensor:
    """x + emb, emb broadcast over the spatial dimensions."""
    return x + _per_channel(emb, x)


def q_sample(
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
) -> Tensor:
    """sqrt(abar_t) x0 + sqrt(1 - abar_t) noise."""
    shape = (-1, *[1] * (x0.ndim - 1))
    signal = sqrt_alphas_cumprod[t].view(shape)
    sigma = sqrt_one_minus_alphas_cumprod[t].view(shape)
    return (signal * x0 + sigma * noise).to(x0.dtype)


def sampler_step(
    x: Tensor, model_out: Tensor, noise: Tensor | None, table: Tensor, step: Tensor
) -> Tensor:
    """One row of the coefficient table (see ``fastdiff.samplers.table``)."""
    # table[step] would wait for a GPU to tell the step, and take -1 for the last row.
    row = table.index_select(0, step.reshape(1)).squeeze(0)
    x0_x, x0_m, low, high, out_x, out_x0, out_m, amount, logvar, logvar_v = row.unbind()
    wide = torch.promote_types(x.dtype, table.dtype)
    channels = x.shape[1]
    x_t, m = x.to(wide), model_out[:, :channels].to(wide)
    x0 = torch.clamp(x0_x * x_t + x0_m * m, low, high)
    out = out_x * x_t + out_x0 * x0 + out_m * m
    if noise is not None:
        if model_out.shape[1] == 2 * channels:
            logvar = logvar + logvar_v * model_out[:, channels:].to(wide)
        out = out + amount * torch.exp(logvar / 2) * noise.to(wide)
    return out.to(x.dtype)


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(*value.shape, *[1] * (x.ndim - 2))
