"""Every operation in plain PyTorch: the reference for tests of the kernels, and the fallback.

The code is written for clarity. Like the kernels, it computes statistics and sums in float32 or
better and returns the result in the input's dtype. Arguments are those of the operation in
``fastdiff.ops``, already checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastdiff.ops.conv2d_spec import ConvSpec

_WORD = 0xFFFFFFFF  # mask of a Philox word, 32 bits


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
    skip: Tensor | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """y = silu(group_norm(cat(x, skip) + add) * (1 + scale) + shift) + residual.

    ``statistics`` are ignored, since torch.group_norm computes them itself.
    """
    if skip is not None:
        x = torch.cat((x, skip), dim=1).contiguous(memory_format=suggest_memory_format(x))
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


def q_sample_from_seed(
    x0: Tensor,
    t: Tensor,
    seed: Tensor,
    row: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
) -> Tensor:
    """q_sample with the noise of ``philox_normal``, not rounded."""
    noise = _noise(seed, row, x0)
    y = q_sample(x0, t, noise, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod)
    return y.contiguous(memory_format=suggest_memory_format(x0))


def denoising_loss(
    prediction: Tensor,
    x0: Tensor | None,
    noise: Tensor | None,
    t: Tensor,
    target_x0: Tensor,
    target_noise: Tensor,
    weight: Tensor,
) -> Tensor:
    """weight_t mean((prediction - p_t x0 - q_t noise)^2) of each image."""
    shape = (-1, *[1] * (prediction.ndim - 1))
    error = prediction.to(weight.dtype)
    if x0 is not None:
        error = error - target_x0[t].view(shape) * x0
    if noise is not None:
        error = error - target_noise[t].view(shape) * noise
    images = prediction.shape[0]
    size = math.prod(prediction.shape[1:])
    return weight[t] * error.square().reshape(images, size).mean(1)


def denoising_loss_from_seed(
    prediction: Tensor,
    x0: Tensor | None,
    seed: Tensor,
    row: Tensor,
    t: Tensor,
    target_x0: Tensor,
    target_noise: Tensor,
    weight: Tensor,
) -> Tensor:
    """denoising_loss with the noise of ``philox_normal``, not rounded."""
    noise = _noise(seed, row, prediction)
    return denoising_loss(prediction, x0, noise, t, target_x0, target_noise, weight)


def _noise(seed: Tensor, row: Tensor, x: Tensor) -> Tensor:
    """Noise like x, not rounded: float32, or float64 for float64 images."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return _normal(seed, row.reshape(1, 1), math.prod(x.shape[1:]), wide).view(x.shape)


def conv_epilogue(
    x: Tensor, bias: Tensor | None, emb: Tensor | None, residual: Tensor | None, spans: int
) -> tuple[Tensor, Tensor]:
    """x + bias + emb + residual, and the statistics of each channel over spans of its pixels."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        y = y + _per_channel(bias.unsqueeze(0), x)
    if emb is not None:
        y = y + _per_channel(emb, x)
    if residual is not None:
        y = y + residual
    y = y.to(x.dtype).contiguous(memory_format=suggest_memory_format(x))
    return y, _channel_statistics(y.detach(), spans) if spans else y.new_empty(
        0, dtype=torch.float32
    )


def _channel_statistics(y: Tensor, spans: int) -> Tensor:
    """For each span the number of values, their mean, the rounding error of the float32 mean, and
    the sum of squared deviations: float32 [N, S, 4, C].
    """
    n, c = y.shape[:2]
    values = y.double().reshape(n, c, math.prod(y.shape[2:]))
    length = -(-values.shape[2] // spans)
    parts = []
    for span in range(spans):
        part = values[..., span * length : (span + 1) * length]
        count = values.new_full((n, c), part.shape[2])
        mean = part.sum(2) / count.clamp(min=1)
        deviation = (part - mean[..., None]).square().sum(2)
        parts.append(torch.stack((count, mean, mean - mean.float(), deviation), dim=1))
    return torch.stack(parts, dim=1).float()


def upsample_nearest2x(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by a factor of 2."""
    if x.numel() == 0:  # F.interpolate refuses empty tensors
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def upsample_nearest2x_backward(grad: Tensor) -> Tensor:
    """The sum of each square of four pixels."""
    if grad.numel() == 0:  # F.avg_pool2d refuses empty tensors
        return grad[:, :, ::2, ::2].clone()
    return F.avg_pool2d(grad, 2, divisor_override=1)


def channel_statistics(x: Tensor) -> Tensor:
    """Mean and biased variance over each channel's pixels, float64 [N, C, 2]."""
    values = x.flatten(2).double() if x.ndim > 2 else x.double().unsqueeze(2)
    mean = values.mean(2)
    return torch.stack((mean, (values - mean.unsqueeze(2)).square().mean(2)), dim=2)


def group_norm_coefficients(
    statistics: Sequence[Tensor],
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """[N, 2, C]: a and b of a x + b = group_norm(x) * (1 + scale) + shift."""
    n, channels = statistics[0].shape[0], sum(value.shape[1] for value in statistics)
    if n * channels == 0:
        return statistics[0].new_empty((n, 2, channels), dtype=torch.float32)
    mean, a = _group_statistics(statistics, num_groups, eps)
    b = -mean * a
    if weight is not None:
        a, b = a * weight, b * weight
    if bias is not None:
        b = b + bias
    if scale is not None:
        a, b = a * (1 + scale.double()), b * (1 + scale.double())
    if shift is not None:
        b = b + shift
    return torch.stack((a, b), dim=1).float()


def _group_statistics(
    statistics: Sequence[Tensor], num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of the group of each channel, float64 [N, C]."""
    mean, variance = torch.cat(tuple(statistics), dim=1).unbind(2)
    by_group = mean.view(mean.shape[0], num_groups, -1)
    group_mean = by_group.mean(2, keepdim=True)
    spread = variance.view_as(by_group) + (by_group - group_mean).square()
    rstd = (spread.mean(2, keepdim=True) + eps).rsqrt()
    return group_mean.expand_as(by_group).reshape(mean.shape), rstd.expand_as(by_group).reshape(
        mean.shape
    )


def norm_backward(
    grad: Tensor,
    x: Tensor,
    statistics: Sequence[Tensor],
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    skip: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of silu(h w (1 + scale) + b (1 + scale) + shift), where h is the normalised
    concatenation of x and skip: of x, skip, w, b, scale and shift, empty for what is not given.
    """
    joined = x if skip is None else torch.cat((x, skip), dim=1)
    wide = torch.promote_types(x.dtype, torch.float32)
    n, channels = joined.shape[:2]
    values, du = joined.to(wide), grad.to(wide)
    one, none = values.new_ones((1, channels)), values.new_zeros((1, channels))
    gain = one if weight is None else weight.to(wide)[None]
    grow = one if scale is None else 1 + scale.to(wide)
    offset = (none if bias is None else bias.to(wide)[None]) * grow
    if shift is not None:
        offset = offset + shift
    h = values
    if num_groups and values.numel():
        mean, rstd = _group_statistics(statistics, num_groups, eps)
        h = ((values - _per_channel(mean, x)) * _per_channel(rstd, x)).to(wide)
    if silu:
        s = torch.sigmoid(u := h * _per_channel(gain * grow, x) + _per_channel(offset, x))
        du = du * (s + u * s * (1 - s))
    dx = du
    if num_groups and values.numel():
        groups = (n, num_groups, -1)
        dh, by_group = (du * _per_channel(gain * grow, x)).reshape(groups), h.reshape(groups)
        dh = dh - dh.mean(2, keepdim=True) - by_group * (dh * by_group).mean(2, keepdim=True)
        dx = (dh.view(h.shape) * _per_channel(rstd, x)).to(wide)
    dx = dx.to(x.dtype)
    shifted, scaled = du.sum((2, 3)), (du * h).sum((2, 3))  # gradients of an offset and of a gain
    of = {
        "weight": (weight, (scaled * grow).sum(0)),
        "bias": (bias, (shifted * grow).sum(0)),
        "scale": (scale, scaled * gain + shifted * (none if bias is None else bias.to(wide))),
        "shift": (shift, shifted),
    }
    images = [
        part.contiguous(memory_format=torch.channels_last)
        for part in (dx[:, : x.shape[1]], dx[:, x.shape[1] :])
    ]
    return (
        images[0],
        x.new_empty(0) if skip is None else images[1],
        *(
            x.new_empty(0) if value is None else found.sum_to_size(value.shape).to(value.dtype)
            for value, found in of.values()
        ),
    )


def conv2d(
    x: Tensor,
    weight: Tensor,
    spec: ConvSpec,
    *,
    skip: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    emb: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """(conv(up(act(norm(cat(x, skip))))) + bias + emb + residual) * scale, gated if the spec says
    so, and the statistics of the result or None.
    """
    h, padding = _conv2d_input(x, spec, skip, norm)
    y = F.conv2d(h, weight, bias, spec.stride, padding)
    if emb is not None:
        y = y + _per_channel(emb, y)
    if residual is not None:
        y = y + residual
    if scale != 1:
        y = y * scale
    if spec.gated:
        y = geglu(y.movedim(1, -1)).movedim(-1, 1)
    y = y.contiguous(memory_format=torch.channels_last)
    return y, channel_statistics(y) if spec.statistics else None


def conv2d_weight_gradient(
    dy: Tensor, x: Tensor, spec: ConvSpec, skip: Tensor | None = None, norm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient of the weight of conv(up(act(norm(cat(x, skip))))), and dy's sums over pixels,
    both in float32 at least.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h, padding = _conv2d_input(x.to(wide), spec, None if skip is None else skip.to(wide), norm)
    dy = dy.to(wide)
    _, dw, _ = torch.ops.aten.convolution_backward(
        dy, h, h.new_empty(()).expand(spec.weight), None, spec.stride, padding, (1, 1), False,
        (0, 0), 1, (False, True, False),
    )  # fmt: skip
    return dw.contiguous(memory_format=torch.channels_last), dy.sum((2, 3))


def _conv2d_input(
    x: Tensor, spec: ConvSpec, skip: Tensor | None, norm: Tensor | None
) -> tuple[Tensor, tuple[int, int]]:
    """What conv2d multiplies by its weight, and the padding of rows and columns that is left."""
    h = x if skip is None else torch.cat((x, skip), dim=1)
    if norm is not None:
        wide = torch.promote_types(h.dtype, torch.float32)
        gain, offset = norm.to(wide).unbind(1)
        h = (h.to(wide) * _per_channel(gain, h) + _per_channel(offset, h)).to(x.dtype)
    if spec.silu:
        h = F.silu(h)
    if spec.upsample:
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
    top, bottom, left, right = spec.padding
    if (top, left) == (bottom, right):
        return h, (top, left)
    return F.pad(h, (left, right, top, bottom)), (0, 0)  # F.conv2d pads both sides equally


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, computed in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = (q.to(wide) @ k.to(wide).transpose(2, 3) * scale).softmax(dim=3)
    y = (weights @ v.to(wide)).to(q.dtype)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def geglu(x: Tensor) -> Tensor:
    """a * gelu(b) with x = [a, b] along the last dimension, computed in float32 at least."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (a * F.gelu(b)).to(x.dtype).contiguous()


@torch.no_grad()
def ema_update(averages: Sequence[Tensor], parameters: Sequence[Tensor], weight: Tensor) -> None:
    """a += weight (p - a) for each average and its parameter."""
    if weight.device.type == "cpu" and all(
        a.dtype == p.dtype for a, p in zip(averages, parameters, strict=True)
    ):
        torch._foreach_lerp_(list(averages), list(parameters), weight.item())
        return
    for a, p in zip(averages, parameters, strict=True):  # no .item(), which would wait for the GPU
        wide = torch.promote_types(a.dtype, torch.float32)
        a.copy_(torch.lerp(a.to(wide), p.to(wide), weight.to(wide)))


@torch.no_grad()
def adamw_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    gradient_factor: float,
    average_weight: float,
) -> None:
    """A step of AdamW on every parameter, then of the averages towards the parameters."""
    tensors = zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True)
    for p, gradient, exp_avg, exp_avg_sq in tensors:
        g = gradient * gradient_factor
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step) + eps
        p.mul_(1 - lr * weight_decay)
        p.addcdiv_(exp_avg, root, value=-lr / (1 - beta1**step))
    for average, p in zip(averages, parameters, strict=bool(averages)):
        average.lerp_(p, average_weight)


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all elements of all gradients, float64 []."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.linalg.vector_norm(
        torch.stack(torch._foreach_norm(list(gradients), 2, torch.float64))
    )


@torch.no_grad()
def sampler_step(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    seed: Tensor | None,
    out: Tensor,
) -> None:
    """Apply one row of the coefficient table (see ``fastdiff.samplers.table``).

    Choices that depend on the row are made by torch.where: if the host read the row, it would wait
    for a GPU, and the step could not be captured in a CUDA graph. On a CPU the row is read to skip
    costly work whose coefficient is 0.
    """
    # table[step] would wait for a GPU, and would accept -1.
    row = table.index_select(0, step.reshape(1)).squeeze(0)
    if x.numel() == 0:
        return
    (
        guidance, rescale, x0_x, x0_m, low, high, quantile, out_x, out_x0, out_m, amount, logvar,
        logvar_v, keep_x, keep_x0, keep_m, keep_noise, slot, *factors,
    ) = row.unbind()  # fmt: skip
    wide = torch.promote_types(x.dtype, table.dtype)
    (images, channels), rest = x.shape[:2], [1] * (x.ndim - 1)
    x_t = x.to(wide)
    m, v = model_out[:, :channels].to(wide), model_out[-images:, channels:].to(wide)
    if model_out.shape[0] == 2 * images:  # unconditional, conditional
        m_u, m_c = m[:images], m[images:]
        m = m_u + guidance * (m_c - m_u)
        if _may_act(rescale):
            std_c, std = (
                value.flatten(1).std(1, correction=0).view(-1, *rest) for value in (m_c, m)
            )
            ratio = torch.where(std == 0, 1.0, std_c / std)  # arXiv:2305.08891, eq. 15 and 16
            m = torch.where(rescale == 0, m, m * (1 - rescale + rescale * ratio))
    free = x0_x * x_t + x0_m * m
    x0 = torch.clamp(free, low, high)
    if _may_act(quantile):
        s = _quantile(free.abs().flatten(1), quantile).view(-1, *rest).clamp(min=1).minimum(high)
        x0 = torch.where(quantile > 0, torch.clamp(free, -s, s) / s, x0)
    new = out_x * x_t + out_x0 * x0 + out_m * m
    kept = keep_x * x_t + keep_x0 * x0 + keep_m * m
    for j, factor in enumerate(factors):
        assert history is not None
        new = new + torch.where(factor == 0, 0.0, factor * history[j])
    z = noise
    if seed is not None and (_may_act(amount) or _may_act(keep_noise)):
        z = _normal(seed, step, x[:1].numel(), wide).view(x.shape)
    if z is not None:
        z = z.to(wide)
        if model_out.shape[1] == 2 * channels:
            logvar = logvar + torch.where(logvar_v == 0, 0.0, logvar_v * v)
        new = new + torch.where(amount == 0, 0.0, amount * torch.exp(logvar / 2) * z)
        kept = kept + torch.where(keep_noise == 0, 0.0, keep_noise * z)
    if factors:
        assert history is not None
        index = slot.clamp(min=0).long().reshape(1)
        kept = torch.where(slot >= 0, kept, history.index_select(0, index).squeeze(0))
        history.index_copy_(0, index, kept.unsqueeze(0))
    out.copy_(new)


def _may_act(coefficient: Tensor) -> bool:
    """Whether a coefficient may differ from 0; True, unread, if reading it would wait for a GPU."""
    if coefficient.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return bool(coefficient != 0)


@torch.no_grad()
def philox_normal(seed: Tensor, row: int, out: Tensor) -> None:
    """Standard normal noise from a counter, written to ``out``; see ``ops.philox_normal``."""
    wide = torch.promote_types(out.dtype, torch.float32)
    out.copy_(_normal(seed, row, out[:1].numel(), wide).view(out.shape))


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The four words of Philox4x32-10 (Salmon et al. 2011), in int64 tensors that broadcast."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a * b, from 16 bits of a at a time, so that products fit into int64."""
    low = (a & 0xFFFF) * b
    middle = (a >> 16) * b + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def _normal(seed: Tensor, row: Tensor | int, elements: int, wide: torch.dtype) -> Tensor:
    """Normal values [N, elements] for ``seed`` [N, 2]; see ``ops.philox_normal``.

    Computed in float64: an angle rounded to float32 would leave few correct digits near the zeros
    of sine and cosine.
    """
    group = torch.arange(-(-elements // 4), device=seed.device)
    key, image = seed[:, :1], seed[:, 1:]
    last = torch.zeros_like(image) + row
    words = philox(
        (group & _WORD, group >> 32, image & _WORD, last & _WORD), (key & _WORD, key >> 32 & _WORD)
    )
    u0, u1, u2, u3 = ((word >> 8).double() * 2.0**-24 for word in words)
    values = []
    for u, v in ((u0, u1), (u2, u3)):  # Box and Muller 1958
        radius, angle = torch.sqrt(-2 * torch.log(1 - u)), 2 * math.pi * v
        values += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(values, dim=2).flatten(1)[:, :elements].to(wide)


def _quantile(values: Tensor, q: Tensor) -> Tensor:
    """torch.quantile(values, q, dim=1) for any number of values, with q's range unchecked.

    A NaN among the values gives NaN.
    """
    values = values.sort(dim=1).values  # NaN is last
    last = values.shape[1] - 1
    position = (q * last).clamp(0, last)
    below = position.floor()
    pair = torch.stack([below, below + 1]).long().clamp(0, last)
    low, high = values.index_select(1, pair).unbind(1)
    quantile = torch.lerp(low, high, position - below)
    return torch.where(values[:, -1].isnan(), torch.nan, quantile)


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(*value.shape, *[1] * (x.ndim - 2))
