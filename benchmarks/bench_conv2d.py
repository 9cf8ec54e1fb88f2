"""conv2d by each of its algorithms against PyTorch's channels_last convolution, alone and fused
with a norm, an activation and a residual.

Weights are packed beforehand, as the compiler packs them once for a model. All convolutions are
3x3.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import Comparison, every_shape
from torch import Tensor

from fastdiff import ops

GROUPS = 32
PADDING = (1, 1, 1, 1)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of the result's largest value

# Without oneDNN's bfloat16 convolution, PyTorch's is too slow for a comparison.
bfloat16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no native bfloat16"
    ),
)
every_algorithm = pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, bfloat16], ids=["f32", "bf16"])
convolutions = every_shape(  # batch, channels in and out, size
    (8, 128, 128, 32), (8, 256, 256, 16), (2, 320, 320, 64), (1, 256, 256, 16)
)  # fmt: skip


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, outputs, size = shape
    torch.manual_seed(0)
    x = torch.randn(n, channels, size, size)
    weight = torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5
    nhwc = torch.channels_last
    return x.to(dtype, memory_format=nhwc), weight.to(dtype), torch.randn(outputs).to(dtype)


def check(result: Tensor, expected: Tensor) -> None:
    difference = (result.float() - expected.float()).abs().max()
    assert difference <= TOLERANCE[result.dtype] * expected.abs().max()


def rate(shape: tuple[int, ...]):
    """Notes: GFLOP/s, counting the operations of the direct algorithm."""
    n, channels, outputs, size = shape
    flops = 2 * 9 * n * channels * outputs * size**2
    return lambda comparison: {"GFLOP/s": f"{flops / comparison.ours / 1e9:.0f}"}


@every_algorithm
@every_dtype
@convolutions
def bench_plain(versus, shape, dtype, algorithm) -> None:
    x, weight, bias = make(shape, dtype)
    packed = ops.conv2d_pack(weight, algorithm)
    nhwc = weight.to(memory_format=torch.channels_last)

    def ours() -> Tensor:
        return ops.conv2d(
            x, weight, bias, padding=PADDING, packed=packed, algorithm=algorithm
        )[0]  # fmt: skip

    with torch.no_grad():
        check(ours(), F.conv2d(x, nhwc, bias, padding=1))
        versus(ours, {"torch": lambda: F.conv2d(x, nhwc, bias, padding=1)}, notes=rate(shape))


@every_algorithm
@every_dtype
@convolutions
def bench_fused(versus, shape, dtype, algorithm) -> None:
    """Norm, SiLU, convolution, residual and statistics; "bare" is the convolution alone."""
    x, weight, bias = make(shape, dtype)
    packed = ops.conv2d_pack(weight, algorithm)
    nhwc = weight.to(memory_format=torch.channels_last)
    residual = torch.randn_like(x)
    norm = ops.group_norm_coefficients([ops.channel_statistics(x)], GROUPS)
    gain, offset = norm.to(dtype)[..., None, None].unbind(1)
    call = {"padding": PADDING, "packed": packed, "algorithm": algorithm}

    def ours() -> Tensor:
        return ops.conv2d(
            x, weight, bias, norm=norm, silu=True, residual=residual, statistics=True, **call
        )[0]

    def torchs() -> Tensor:
        return F.conv2d(F.silu(torch.addcmul(offset, x, gain)), nhwc, bias, padding=1) + residual

    def notes(comparison: Comparison) -> dict[str, str]:
        more = comparison.ours / comparison.peers["bare"] - 1
        return rate(shape)(comparison) | {"to bare": f"{more:+.0%}"}

    with torch.no_grad():
        check(ours(), torchs())
        bare = {"bare": lambda: ops.conv2d(x, weight, bias, **call)[0]}
        versus(ours, {"torch": torchs} | bare, notes=notes)
