"""conv2d by each of its algorithms against PyTorch's channels_last convolution and oneDNN's with a
packed weight: 3x3 alone, 3x3 fused with a norm, an activation and a residual, and linear layers.

Weights are packed beforehand, as the compiler packs them once for a model, and as Inductor does for
a frozen one. The algorithms are those of the extension's list, for each dtype those that take it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparison import DTYPES as EVERY_DTYPE
from comparison import Comparison, every_shape
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, suits
from fastdiff.ops.conv2d_spec import ConvSpec

GROUPS = 32
PADDING = (1, 1, 1, 1)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of the result's largest value

# Without oneDNN's bfloat16 convolution, PyTorch's is too slow for a comparison.
NATIVE = {
    torch.float32: [],
    torch.bfloat16: [
        pytest.mark.skipif(
            not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no native bfloat16"
        )
    ],
}


def every_algorithm(kernel: int, gated: bool = False) -> pytest.MarkDecorator:
    """Each dtype with the algorithms that suit it, for a square kernel and even channels."""
    padding = (kernel // 2,) * 4
    spec = ConvSpec(512, 512, (kernel, kernel), (1, 1), padding, gated=gated)  # type: ignore[arg-type]
    return pytest.mark.parametrize(
        ("dtype", "algorithm"),
        [
            pytest.param(dtype, name, marks=NATIVE[dtype], id=f"{short}-{name}")
            for short, dtype in EVERY_DTYPE.items()
            for name in ALGORITHMS
            if suits(name, spec, dtype)
        ],
    )


convolutions = every_shape(  # batch, channels in and out, size
    (8, 128, 128, 32), (8, 256, 256, 16), (2, 320, 320, 64), (1, 256, 256, 16)
)  # fmt: skip
linears = every_shape(  # the same, for Stable Diffusion's attention and feed-forward layers
    (2, 320, 320, 64), (2, 640, 640, 32), (2, 1280, 1280, 16), (2, 1280, 320, 64)
)  # fmt: skip
gated_linears = every_shape((2, 320, 2560, 64), (2, 640, 5120, 32), (2, 1280, 10240, 16))


def make(
    shape: tuple[int, ...], dtype: torch.dtype, kernel: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, outputs, size = shape
    torch.manual_seed(0)
    x = torch.randn(n, channels, size, size)
    weight = torch.randn(outputs, channels, kernel, kernel) / (kernel**2 * channels) ** 0.5
    nhwc = torch.channels_last
    return x.to(dtype, memory_format=nhwc), weight.to(dtype), torch.randn(outputs).to(dtype)


def onednn_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """oneDNN's 3x3 convolution of one size, its weight in the layout that oneDNN wants for it."""
    settings = [1, 1], [1, 1], [1, 1], 1  # padding, stride, dilation, groups
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, list(x.shape))
    return lambda: torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, *settings, "none", [], ""
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """oneDNN's linear layer of one number of rows, its weight in the layout for that."""
    rows = x.shape[:-1].numel()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def check(result: Tensor, expected: Tensor) -> None:
    difference = (result.float() - expected.float()).abs().max()
    assert difference <= TOLERANCE[result.dtype] * expected.abs().max()


def rate(shape: tuple[int, ...], kernel: int = 3):
    """Notes: GFLOP/s, counting the operations of the direct algorithm."""
    n, channels, outputs, size = shape
    flops = 2 * kernel**2 * n * channels * outputs * size**2
    return lambda comparison: {"GFLOP/s": f"{flops / comparison.ours / 1e9:.0f}"}


@every_algorithm(3)
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
        peers = {
            "torch": lambda: F.conv2d(x, nhwc, bias, padding=1),
            "onednn": onednn_conv2d(x, weight, bias),
        }
        for peer in peers.values():
            check(ours(), peer())
        versus(ours, peers, notes=rate(shape))


@every_algorithm(3)
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


@every_algorithm(1)
@linears
def bench_linear(versus, shape, dtype, algorithm) -> None:
    """A linear layer over all pixels, which for fastdiff is a 1x1 convolution."""
    x, weight, bias = make(shape, dtype, kernel=1)
    packed = ops.conv2d_pack(weight, algorithm)
    rows, matrix = x.permute(0, 2, 3, 1), weight[..., 0, 0]

    def ours() -> Tensor:
        return ops.conv2d(x, weight, bias, packed=packed, algorithm=algorithm)[0]

    with torch.no_grad():
        peers = {
            "torch": lambda: F.linear(rows, matrix, bias),
            "onednn": onednn_linear(rows, matrix, bias),
        }
        for peer in peers.values():
            check(ours().permute(0, 2, 3, 1), peer())
        versus(ours, peers, notes=rate(shape, 1))


@every_algorithm(1, gated=True)
@gated_linears
def bench_gated_linear(versus, shape, dtype, algorithm) -> None:
    """The linear layer of GEGLU with its gate; oneDNN has the gate as a pass of its own."""
    x, weight, bias = make(shape, dtype, kernel=1)
    packed = ops.conv2d_pack(weight, algorithm)
    rows, matrix = x.permute(0, 2, 3, 1), weight[..., 0, 0]

    def ours() -> Tensor:
        return ops.conv2d(x, weight, bias, gated=True, packed=packed, algorithm=algorithm)[0]

    def gated(linear: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            a, b = linear().chunk(2, dim=-1)
            return a * F.gelu(b)

        return run

    with torch.no_grad():
        peers = {
            "torch": gated(lambda: F.linear(rows, matrix, bias)),
            "onednn": gated(onednn_linear(rows, matrix, bias)),
        }
        for peer in peers.values():
            check(ours().permute(0, 2, 3, 1), peer())
        versus(ours, peers, notes=rate(shape, 1))
