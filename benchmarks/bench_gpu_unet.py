"""A U-Net's step and a sampling loop on a GPU: eager, compiled, and as CUDA graphs.

The times are the host's, from the call to the end of the device's work: what eager calls lose to
launches is part of what is measured. Everything takes turns, and medians count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import every_dtype, on_reference
from torch import Tensor

import fastdiff
from fastdiff import samplers, schedules
from fastdiff.nn.image_unet import make_unet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROUNDS = 20
STEPS = 10  # of the sampling loop
SIZE, CHANNELS = 32, 3  # of the images
WIDTHS = (128, 256, 256, 256)  # as the U-Net of DDPM for CIFAR-10 has them
# Of the largest value; convolutions in float32 are PyTorch's default, TF32.
TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.1}


@pytest.fixture
def in_turns(benchmark, request, capsys) -> Callable[..., None]:
    """in_turns(calls, images): time calls that give the same tensor, and print images a second."""

    def compare(calls: dict[str, Callable[[], Tensor]], images: int) -> None:
        times: dict[str, list[float]] = {name: [] for name in calls}
        expected = next(iter(calls.values()))()
        for call in calls.values():
            result = call()
            allowed = TOLERANCE[result.dtype] * float(expected.abs().max())
            torch.testing.assert_close(result, expected, atol=allowed, rtol=0)
        for _ in range(ROUNDS):
            for name, call in calls.items():
                torch.cuda.synchronize()
                began = time.perf_counter()
                call()
                torch.cuda.synchronize()
                times[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        benchmark.extra_info.update(medians)
        parts = [f"{n} {s * 1e3:.2f} ms, {images / s:.0f} images/s" for n, s in medians.items()]
        with capsys.disabled():
            print("\n" + "; ".join([f"{request.node.name:<40}", *parts]))
        benchmark.pedantic(next(iter(calls.values())), rounds=1)

    return compare


def _unet(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = make_unet(SIZE, CHANNELS, 0, widths=WIDTHS).eval()
    return model.to("cuda", dtype, memory_format=torch.channels_last)


@every_dtype
@pytest.mark.parametrize("batch", [1, 64])
@torch.no_grad()
def bench_unet_step(in_turns, dtype, batch) -> None:
    model = _unet(dtype)
    x = torch.randn(batch, CHANNELS, SIZE, SIZE, device="cuda", dtype=dtype)
    t = torch.full((batch,), 500, device="cuda")
    compiled = {
        "fastdiff compiled": torch.compile(model, backend="fastdiff"),
        "inductor": torch.compile(model, mode="max-autotune-no-cudagraphs"),
        "inductor, cudagraphs": torch.compile(model, mode="reduce-overhead"),
    }
    calls = {
        "eager": on_reference(lambda: model(x, t)),
        "fastdiff eager": lambda: model(x, t),
        "fastdiff cudagraph": _captured(lambda: model(x, t)),
    }
    for name, network in compiled.items():
        run = lambda network=network: network(x, t).clone()  # noqa: E731 - a graph's is overwritten
        calls[name] = run if name.startswith("fastdiff") else on_reference(run)
    in_turns(calls, batch)


def _captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@every_dtype
@pytest.mark.parametrize("batch", [1, 64])
@torch.no_grad()
def bench_gpu_sampling_loop(in_turns, dtype, batch) -> None:
    model = _unet(dtype)
    sampler = samplers.DDIM(schedules.cosine(), STEPS)
    shape = (batch, CHANNELS, SIZE, SIZE)
    x_T = torch.randn(shape, device="cuda", dtype=dtype)

    def loop(mode: str, network: Any = model) -> Callable[[], Tensor]:
        return lambda: fastdiff.sample(
            network, sampler, shape, x_T=x_T, mode=mode, progress=False
        ).clone()

    in_turns(
        {
            "eager": on_reference(loop("eager")),
            "fastdiff eager": loop("eager"),
            "fastdiff cudagraph": loop("cudagraph"),
            "fastdiff compiled": loop("eager", torch.compile(model, backend="fastdiff")),
        },
        batch,
    )
