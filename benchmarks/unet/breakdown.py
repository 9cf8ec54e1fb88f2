"""The parts of a U-Net's call, and how close each convolution comes to the machine's peak."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import parts
from benchmarks.unet.prepared import Prepared

LAYERS = "convolutions and linear layers"
PARTS = {  # for each part the beginnings of its operations' names
    LAYERS: (
        "fastdiff::conv2d",
        "aten::conv",
        "aten::_convolution",
        "aten::mkldnn_convolution",
        "mkldnn::_convolution",
        "aten::linear",
        "aten::addmm",
        "aten::mm",
        "mkldnn::_linear",
        "mkl::_mkl_linear",
    ),
    "norms": (
        "fastdiff::group_norm",
        "fastdiff::channel_statistics",
        "aten::group_norm",
        "aten::native_group_norm",
        "aten::layer_norm",
        "aten::native_layer_norm",
    ),
    "attention": (
        "fastdiff::attention",
        "aten::scaled_dot_product",
        "aten::_scaled_dot_product",
    ),
}


@dataclass(frozen=True)
class Convolution:
    """The key by which convolutions are grouped; a linear layer is a 1x1 convolution of L x 1."""

    input: tuple[int, ...]  # [N, C, H, W], of the concatenation if there are two inputs
    weight: tuple[int, ...]  # [K, C, R, S]
    stride: tuple[int, ...]
    upsample: bool
    algorithm: str
    outputs: int  # pixels of the result

    @property
    def flops(self) -> int:
        """Floating-point operations of the direct algorithm, even if another one computed it."""
        k, c, r, s = self.weight
        return 2 * self.input[0] * self.outputs * k * c * r * s

    def as_dict(self) -> dict[str, Any]:
        return {
            "input": self.input,
            "weight": self.weight,
            "stride": self.stride,
            "upsample": self.upsample,
            "algorithm": self.algorithm,
        }


def measure(prepared: Prepared, inputs: tuple[Tensor, ...], calls: int) -> dict[str, Any]:
    """Milliseconds of each part of a call, the rate of each convolution, and the peak rate.

    Args:
        prepared: a PyTorch peer.
        inputs: of the network, fitted to the peer.
        calls: number of recorded calls.
    """
    peak, where = peak_rate(prepared.dtype)

    def call() -> Tensor:
        return prepared.call(*inputs)

    return parts.measure(call, calls, _part) | {
        "convolutions": _convolutions(parts.record(call, calls, shapes=True)),
        "peak_gflops": peak,
        "peak_of": where,
    }


def peak_rate(dtype: torch.dtype) -> tuple[float, str]:
    """GFLOP/s of the fastest of some large products and convolutions, and its name.

    They are computed in ``dtype`` and in float32, since without native arithmetic for ``dtype``
    kernels compute in float32.
    """
    rates: dict[str, float] = {}
    for kind in dict.fromkeys((torch.float32, dtype)):
        for name, flops, call in _large(kind):
            rate = _rate(flops, call)
            rates[f"{name} in {str(kind).removeprefix('torch.')}"] = rate
            if rate < max(rates.values()) / 4:  # emulated; larger sizes would take minutes
                break
    best = max(rates, key=rates.__getitem__)
    return rates[best], best


def _large(dtype: torch.dtype) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """Name, number of operations and call of large products and convolutions, smallest first."""
    for n in (512, 1024, 2048):
        a, b = torch.randn(2, n, n).to(dtype)
        yield f"{n} x {n} matrix product", 2 * n**3, partial(torch.mm, a, b)
    for channels, size, kernel in ((128, 32, 3), (256, 32, 3), (512, 32, 1)):
        x = torch.randn(8, channels, size, size)
        weight = torch.randn(channels, channels, kernel, kernel)
        x, weight = (v.to(dtype, memory_format=torch.channels_last) for v in (x, weight))
        yield (
            f"{kernel}x{kernel} convolution of {channels} channels, PyTorch's,",
            2 * 8 * size**2 * channels**2 * kernel**2,
            partial(F.conv2d, x, weight, padding=kernel // 2),
        )


def _rate(flops: int, call: Callable[[], Tensor]) -> float:
    taken: list[float] = []
    deadline = time.perf_counter() + 1.0
    while len(taken) < 2 or (time.perf_counter() < deadline and len(taken) < 50):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return flops / min(taken) / 1e9


def _part(name: str, phase: str = "") -> str | None:
    return parts.by_beginning(PARTS, name)


def _convolutions(calls: list[Any]) -> list[dict[str, Any]]:
    """For each kind of convolution its number in a call, its total milliseconds and its rate.

    Milliseconds are the median over the calls.
    """
    taken_by: dict[Convolution, list[list[float]]] = defaultdict(lambda: [[] for _ in calls])
    for number, call in enumerate(calls):
        events = [call]
        while events:
            event = events.pop()
            if _part(event.name) is None:
                events += event.cpu_children
            elif _part(event.name) == LAYERS and (shape := _convolution(event)) is not None:
                taken_by[shape][number].append(event.time_range.elapsed_us())
    rows = []
    for shape, taken in taken_by.items():
        times, us = len(taken[0]), statistics.median(map(sum, taken))
        rows.append(
            shape.as_dict()
            | {"calls": times, "milliseconds": us / 1e3, "gflops": shape.flops * times / us / 1e3}
        )
    return sorted(rows, key=lambda row: -row["milliseconds"])


def _convolution(event: Any) -> Convolution | None:
    """The convolution of an event, from its recorded arguments; None if they do not suffice."""
    try:
        given = _arguments(event)
        if event.name.startswith("fastdiff::"):
            return _fused(given)
        if event.name == "aten::linear":
            x, weight = given["input"], given["weight"]
            rows = 1
            for size in x[:-1]:
                rows *= size
            return Convolution((1, x[-1], rows, 1), (*weight, 1, 1), (1, 1), False, "linear", rows)
        x, weight, stride, padding = (
            tuple(given[name]) for name in ("input", "weight", "stride", "padding")
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    if len(x) != 4 or len(weight) != 4:
        return None
    outputs = 1
    for size, kernel, step, pad in zip(x[2:], weight[2:], stride, padding, strict=True):
        outputs *= (size + 2 * pad - kernel) // step + 1
    return Convolution(x, weight, stride, False, "PyTorch's", outputs)


def _fused(given: dict[str, Any]) -> Convolution:
    from fastdiff.ops.conv2d_algorithms import numbered
    from fastdiff.ops.conv2d_spec import ConvSpec

    spec = ConvSpec.decode(given["spec"])
    n, _, *size = given["x"]
    height, width = spec.output_size(size)
    return Convolution(
        (n, spec.channels, *size),
        spec.weight,
        spec.stride,
        spec.upsample,
        numbered(given["algorithm"]).name,
        height * width,
    )


def _arguments(event: Any) -> dict[str, Any]:
    """Arguments by their names in the operation's schema: sizes of tensors, values of others."""
    namespace, _, name = event.name.partition("::")
    schema = getattr(getattr(torch.ops, namespace), name).default._schema
    names = [argument.name for argument in schema.arguments]
    return {
        key: value if value is not None and not shape else shape
        for key, shape, value in zip(names, event.input_shapes, event.concrete_inputs, strict=True)
    }
