"""A convolution fused with the norm and activation of its input and the additions to its output,
with gradients: for training on a CPU. ``fastdiff.compiler`` puts it into graphs with gradients.

The backward reads what the forward read: the input, and the mean and variance of its channels. The
activated tensor is computed again while it is read, so it is neither stored nor kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops import conv2d_algorithms, reference
from fastdiff.ops.conv2d import kernel_runs
from fastdiff.ops.conv2d_spec import ConvSpec
from fastdiff.ops.profiling import span

PLAIN = "plain"  # PyTorch's own convolution, as the name of an algorithm

_conv2d = torch.ops.fastdiff.conv2d.default
_pack = torch.ops.fastdiff.conv2d_pack.default
_coefficients = torch.ops.fastdiff.group_norm_coefficients.default
_channel_statistics = torch.ops.fastdiff.channel_statistics.default
_weight_gradient = torch.ops.fastdiff.conv2d_weight_gradient.default
_norm_backward = torch.ops.fastdiff.norm_backward.default
_norm_backward_in_place = torch.ops.fastdiff.norm_backward_in_place.default


@dataclass(frozen=True)
class Algorithms:
    """What computes a convolution and its gradients: names as in ``conv2d``.

    Attributes:
        result: of the convolution.
        of_input: of the gradient of its input, itself a convolution (``turned``); or ``plain``.
        of_weight: of the gradient of its weight; or ``plain``.
    """

    result: str = "direct"
    of_input: str = "direct"
    of_weight: str = "direct"


@dataclass(frozen=True)
class NormConv2d:
    """What ``norm_conv2d`` computes, whatever its tensors.

    Attributes:
        spec: the convolution.
        num_groups: groups of the norm; 0 for no norm.
        eps: added to the variance.
        scale: factor of the result.
        algorithms: by which the C++ kernels compute it and its gradients.
    """

    spec: ConvSpec
    num_groups: int = 0
    eps: float = 1e-5
    scale: float = 1.0
    algorithms: Algorithms = Algorithms()

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The spec as the operators take it."""
        return self.spec.encode()

    @cached_property
    def turned(self) -> tuple[int, ...] | None:
        """The convolution of ``turned``, as the operators take it."""
        other = None if self.algorithms.of_input == PLAIN else turned(self.spec)
        return None if other is None else other.encode()

    @cached_property
    def of_result(self) -> int:
        """The number of the algorithm of the result."""
        return conv2d_algorithms.named(self.algorithms.result).number

    @cached_property
    def of_input(self) -> int:
        """The number of the algorithm of the input's gradient."""
        return conv2d_algorithms.named(self.algorithms.of_input).number

    @cached_property
    def of_weight(self) -> int:
        """The number of the algorithm of the weight's gradient."""
        return conv2d_algorithms.named(self.algorithms.of_weight).number


def turned(spec: ConvSpec) -> ConvSpec | None:
    """The convolution that gives the gradient of another one's input, before any upsampling.

    Its weight [C, K, R, S] is the other one's, rotated by half a turn, channels exchanged. There is
    none, but for PyTorch's, where the stride is above 1, or padding as large as the kernel.
    """
    (r, s), (top, bottom, left, right) = spec.kernel, spec.padding
    padding = (r - 1 - top, r - 1 - bottom, s - 1 - left, s - 1 - right)
    if spec.stride != (1, 1) or min(padding) < 0:
        return None
    return ConvSpec(spec.channels, spec.filters, spec.kernel, padding=padding)


def norm_conv2d(
    call: NormConv2d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    emb: Tensor | None = None,
    residual: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None]:
    """y = (conv(up(silu(norm(cat(x, skip))))) + bias + emb + residual) * scale, differentiable
    once in every tensor.

    norm(x) is GroupNorm(x) * (1 + norm_scale) + norm_shift. Sums are taken in float32 at least.

    Args:
        call: the convolution, its norm and its algorithms.
        x: [N, C, H, W], float32 or bfloat16 (other dtypes are computed by the reference).
        weight: [K, C + C', R, S], or of as many elements in fewer dimensions; of any floating
            dtype. Its gradient is summed in float32.
        bias: [K], or None.
        skip: [N, C', H, W], channels to concatenate after those of x, or None.
        gain, offset: of the norm, [C + C'], or None for 1 and 0.
        norm_scale, norm_shift: [N or 1, C + C'], or None for 0 (ADM, arXiv:2105.05233).
        emb: [N or 1, K], added to every pixel, or None.
        residual: like y, or None.
        statistics: the channels' statistics of x, and of skip if it is given: float64 [N, C, 2], as
            ``conv2d`` returns them; they are computed if there are none. Gradients flow through x
            and skip alone: they include what x and skip change in the statistics.

    Returns:
        y [N, K, H', W'], channels-last, of x's dtype; and, if the spec asks for them, its channels'
        statistics, which carry no gradient.

    Raises:
        RuntimeError: a gradient is differentiated again, which the eager mode of PyTorch can.
        TypeError, ValueError: dtypes, shapes or devices do not fit, or an algorithm is not for such
            a convolution.
    """
    tensors = (x, skip, weight, bias, emb, residual, gain, offset, norm_scale, norm_shift)
    with span("norm_conv2d"):
        if not kernel_runs(x) or not conv2d_algorithms.within_limits(call.spec):
            return _reference(call, *tensors)
        y, of_y = _NormConv2d.apply(call, *tensors, *statistics)
        return y, of_y if call.spec.statistics else None


def _reference(
    call: NormConv2d,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    emb: Tensor | None,
    residual: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``norm_conv2d`` by operations of PyTorch."""

    def like_x(row: Tensor | None) -> Tensor | None:
        return None if row is None else row.to(x.dtype)

    spec = call.spec
    h = x if skip is None else torch.cat((x, skip), dim=1)
    if call.num_groups:
        h = reference.group_norm_silu(
            h, call.num_groups, like_x(gain), like_x(offset), call.eps,
            None, like_x(scale), like_x(shift), None, spec.silu,
        )  # fmt: skip
        spec = replace(spec, silu=False)
    rows = None if emb is None else emb.expand(x.shape[0], -1)
    y, _ = reference.conv2d(
        h, weight.view(spec.weight).to(x.dtype), replace(spec, statistics=False),
        bias=like_x(bias), emb=rows, residual=residual, scale=call.scale,
    )  # fmt: skip
    return y, reference.channel_statistics(y.detach()) if spec.statistics else None


class _NormConv2d(torch.autograd.Function):
    """``norm_conv2d`` by the C++ kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        call: NormConv2d,
        x: Tensor,
        skip: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        emb: Tensor | None,
        residual: Tensor | None,
        gain: Tensor | None,
        offset: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        *statistics: Tensor,
    ) -> tuple[Tensor, Tensor]:
        spec, images = call.spec, x.shape[0]
        norm = None
        if call.num_groups:
            inputs = [x] if skip is None else [x, skip]
            statistics = statistics or tuple(map(_channel_statistics, inputs))
            norm = _coefficients(
                list(statistics), call.num_groups, gain, offset, call.eps,
                _rows(scale, images), _rows(shift, images),
            )  # fmt: skip
        packed = _pack(weight.view(spec.weight), call.of_result)
        y, of_y = _conv2d(
            x, packed, call.numbers, call.of_result, skip,
            None if bias is None else bias.to(x.dtype), norm, _rows(emb, images), residual,
            call.scale,
        )  # fmt: skip
        ctx.call, ctx.dtypes = call, [None if t is None else t.dtype for t in (bias, emb)]
        ctx.rows = 0 if emb is None else emb.shape[0]
        ctx.save_for_backward(x, skip, weight, gain, offset, scale, shift, norm, *statistics)
        ctx.mark_non_differentiable(of_y)
        ctx.set_materialize_grads(False)
        return y, of_y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a gradient through fastdiff's fused convolutions cannot be differentiated again: "
                "call the model without torch.compile for second derivatives"
            )
        x, skip, weight, gain, offset, scale, shift, norm, *statistics = ctx.saved_tensors
        call: NormConv2d = ctx.call
        needs = dict(zip(_TENSORS, ctx.needs_input_grad[1:11], strict=True))
        found: dict[str, Tensor | None] = {}
        if dy is not None:
            dy = dy.contiguous(memory_format=torch.channels_last)
            if needs["residual"]:
                found["residual"] = dy if call.scale == 1 else dy * call.scale
            _parameters(call, dy, x, skip, weight, norm, ctx, needs, found)
            if any(needs[name] for name in _BEFORE):
                da = _of_input(call, dy, weight, x)
                before = x, skip, statistics, gain, offset, scale, shift
                found.update(zip(_BEFORE, _through_norm(call, da, *before), strict=True))
        gradients = (found.get(name) if needs[name] else None for name in _TENSORS)
        return (None, *gradients, *(None for _ in ctx.needs_input_grad[11:]))


_TENSORS = (
    "x", "skip", "weight", "bias", "emb", "residual", "gain", "offset", "scale", "shift",
)  # fmt: skip
_BEFORE = ("x", "skip", "gain", "offset", "scale", "shift")  # what is before the convolution


def _rows(value: Tensor | None, images: int) -> Tensor | None:
    """A row for each image, where there may be one for all."""
    return value if value is None or value.shape[0] == images else value.expand(images, -1)


def _parameters(
    call: NormConv2d,
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    norm: Tensor | None,
    ctx: Any,
    needs: dict[str, bool],
    found: dict[str, Tensor | None],
) -> None:
    """Add the gradients of weight, bias and embedding to ``found``."""
    sums = None
    if needs["weight"]:
        dw, sums = _weight_gradient(dy, x, call.numbers, call.of_weight, skip, norm)
        if call.scale != 1:
            dw.mul_(call.scale)
        if call.spec.kernel == (1, 1) and weight.is_contiguous():  # with strides as DDP's buckets
            dw = dw.view(call.spec.weight[:2]).view(weight.shape)
        elif dw.ndim != weight.ndim:
            dw = dw.view(weight.shape)
        found["weight"] = dw if dw.dtype == weight.dtype else dw.to(weight.dtype)
    if not (needs["bias"] or needs["emb"]):
        return
    if sums is None:
        sums = dy.sum((2, 3), dtype=torch.float32)
    if call.scale != 1:
        sums = sums * call.scale
    of_bias, of_emb = ctx.dtypes
    if needs["bias"]:
        found["bias"] = sums.sum(0).to(of_bias)
    if needs["emb"]:  # which may be one row for all images
        of_rows = sums if ctx.rows == sums.shape[0] else sums.sum(0, keepdim=True)
        found["emb"] = of_rows.to(of_emb)


def _of_input(call: NormConv2d, dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The gradient of what the convolution reads, [N, C + C', H, W]."""
    weight = weight.view(call.spec.weight)
    if call.turned is None:
        da = _plain_of_input(call.spec, dy, weight, x)
        da = da * call.scale if call.scale != 1 else da
    else:
        packed = _pack(weight, call.of_input, True)
        da, _ = _conv2d(
            dy, packed, call.turned, call.of_input, None, None, None, None, None, call.scale
        )
    if call.spec.upsample:  # each pixel was read as four
        da = F.avg_pool2d(da, 2, divisor_override=1)
    return da


def _plain_of_input(spec: ConvSpec, dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """``_of_input`` by PyTorch, before upsampling."""
    (top, bottom, left, right), up = spec.padding, 2 if spec.upsample else 1
    height, width = (up * size for size in x.shape[2:])
    size = (x.shape[0], spec.channels, height + top + bottom, width + left + right)
    padded = torch.empty(size, dtype=dy.dtype, memory_format=torch.channels_last)
    da, _, _ = torch.ops.aten.convolution_backward(
        dy, padded, weight.to(dy.dtype), None, spec.stride, (0, 0), (1, 1), False, (0, 0), 1,
        (True, False, False),
    )  # fmt: skip
    return da[:, :, top : top + height, left : left + width].contiguous(
        memory_format=torch.channels_last
    )


def _through_norm(
    call: NormConv2d,
    da: Tensor,
    x: Tensor,
    skip: Tensor | None,
    statistics: Sequence[Tensor],
    gain: Tensor | None,
    offset: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, skip, gain, offset, scale and shift, given that of the activated x."""
    if call.num_groups or call.spec.silu:
        arguments = (
            da, x, list(statistics), call.num_groups, gain, offset, call.eps, scale, shift,
            call.spec.silu, skip,
        )  # fmt: skip
        if skip is None:
            return da, None, *_norm_backward_in_place(*arguments)
        return _norm_backward(*arguments)
    if skip is None:
        return da, None, None, None, None, None
    parts = da.split((x.shape[1], skip.shape[1]), dim=1)
    return *parts, None, None, None, None
