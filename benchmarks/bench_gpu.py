"""The GPU kernels against eager PyTorch and Inductor, in GB/s and as a fraction of a copy's speed.

Every call, of fastdiff and of the peers, is captured in a CUDA graph, so that only the device's
work is timed. The calls take turns, the L2 cache is emptied before each, and medians are reported.
GB/s are computed from the least number of bytes that the operation must move.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import every_dtype, every_layout, every_shape, on_reference
from torch import Tensor

import fastdiff
from fastdiff import ops, samplers, schedules
from fastdiff.ops.backend import missing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROUNDS = 50
SHAPES = ((8, 128, 32, 32), (4, 320, 64, 64), (1, 320, 64, 64), (1, 128, 256, 256))
IMAGES = ((128, 3, 32, 32), (16, 4, 64, 64), (2, 3, 512, 512))
LATENTS = ((1, 4, 64, 64), (16, 4, 64, 64), (64, 3, 256, 256))


class Clock:
    """Device times of captured calls.

    Attributes:
        copied: bytes per second that a copy of a large tensor reads and writes.
    """

    def __init__(self) -> None:
        self.scratch = torch.empty(1 << 29, dtype=torch.int8, device="cuda")
        source, target = torch.empty(2, 1 << 28, dtype=torch.int8, device="cuda")
        seconds = self.medians({"copy": lambda: target.copy_(source)})["copy"]
        self.copied = 2 * source.numel() / seconds

    def medians(self, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each call, in turns."""
        graphs = {name: self._captured(call) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(ROUNDS):
            for name, graph in graphs.items():
                self.scratch.zero_()
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end) / 1e3)
        return {name: statistics.median(taken) for name, taken in times.items()}

    @staticmethod
    def _captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture
def on_device(clock, benchmark, request, capsys) -> Callable[..., None]:
    """on_device(call, tensors, ideal) compares every backend and peer of call(*tensors).

    ``ideal`` is the least number of bytes to move. The peers run ``peer`` in place of ``call``, if
    it is given. Inductor runs ``compiled`` in place of the compiled call, if it is given.
    """

    def compare(
        call: Callable[..., Any],
        tensors: tuple[Any, ...],
        ideal: int,
        compiled: Callable[..., Any] | None = None,
        peer: Callable[..., Any] | None = None,
    ) -> None:
        calls = {}
        for name in ("triton", "cuda"):
            if missing()[name] is None:
                calls[name] = _on(name, call, tensors)
        plain = on_reference(lambda: call(*tensors))
        _agree(calls, plain)
        peers = (peer or call, compiled or inductor(peer or call))
        for name, theirs in zip(("eager", "inductor"), peers, strict=True):
            calls[name] = on_reference(lambda theirs=theirs: theirs(*tensors))
        with torch.no_grad():
            medians = clock.medians(calls)
        parts = [f"{request.node.name:<60}"]
        for name, seconds in medians.items():
            rate = ideal / seconds
            parts.append(
                f"{name} {seconds * 1e6:.1f} us, {rate / 1e9:.0f} GB/s, "
                f"{rate / clock.copied:.2f} of a copy"
            )
            benchmark.extra_info[name] = seconds
        with capsys.disabled():
            print("\n" + "; ".join(parts))
        ours = next(iter(calls.values()))
        benchmark.pedantic(lambda: (ours(), torch.cuda.synchronize()), rounds=10, warmup_rounds=2)

    return compare


def inductor(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(call, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")


def _on(name: str, call: Callable[..., Any], tensors: tuple[Any, ...]) -> Callable[[], Any]:
    def run() -> Any:
        with fastdiff.backend(name):
            return call(*tensors)

    return run


def _agree(calls: dict[str, Callable[[], Any]], plain: Callable[[], Any]) -> None:
    def tensors(result: Any) -> list[Tensor]:
        return [result] if isinstance(result, Tensor) else list(result)

    for call in calls.values():
        for ours, theirs in zip(tensors(call()), tensors(plain()), strict=True):
            tolerance = 1e-4 if theirs.dtype == torch.float32 else 0.1
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def _size(*tensors: Tensor) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


def _normal(shape, dtype, layout=torch.contiguous_format) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout)


@every_layout
@every_dtype
@every_shape(*SHAPES)
def bench_group_norm_silu(on_device, shape, dtype, layout) -> None:
    x, weight, bias = _normal(shape, dtype, layout), *_normal((2, shape[1]), dtype)
    on_device(lambda x, w, b: ops.group_norm_silu(x, 32, w, b), (x, weight, bias), 2 * _size(x))


@every_layout
@every_dtype
@every_shape(*SHAPES)
def bench_group_norm_silu_backward(on_device, shape, dtype, layout) -> None:
    x, grad = _normal(shape, dtype, layout), _normal(shape, dtype, layout)
    weight, bias = _normal((2, shape[1]), dtype)
    leaves = [value.requires_grad_() for value in (x, weight, bias)]

    def norm(x, weight, bias):
        return ops.group_norm_silu(x, 32, weight, bias)

    def backward_of(forward):
        def run(grad):
            with torch.enable_grad():
                y = forward(*leaves)
            return torch.autograd.grad(y, leaves, grad)

        return run

    on_device(  # with the forward pass
        backward_of(norm), (grad,), 5 * _size(x), compiled=backward_of(inductor(norm))
    )


@every_layout
@every_dtype
@every_shape(*SHAPES)
def bench_conv_epilogue(on_device, shape, dtype, layout) -> None:
    x, residual = _normal(shape, dtype, layout), _normal(shape, dtype, layout)
    bias, emb = _normal(shape[1], dtype), _normal(shape[:2], dtype)

    def epilogue(x, bias, emb, residual):
        return ops.conv_epilogue(x, bias, emb, residual)[0]

    on_device(epilogue, (x, bias, emb, residual), 3 * _size(x))


@every_layout
@every_dtype
@every_shape(*SHAPES[:3])
def bench_upsample_nearest2x(on_device, shape, dtype, layout) -> None:
    x = _normal(shape, dtype, layout)
    on_device(ops.upsample_nearest2x, (x,), 5 * _size(x))


@every_layout
@every_dtype
@every_shape(*SHAPES)
def bench_add_time_embedding(on_device, shape, dtype, layout) -> None:
    x, emb = _normal(shape, dtype, layout), _normal(shape[:2], dtype)
    on_device(ops.add_time_embedding, (x, emb), 2 * _size(x))


@every_dtype
@every_shape(*LATENTS)
def bench_philox_normal(on_device, shape, dtype) -> None:
    """The peer is torch.randn on the device."""
    seed = torch.randint(2**62, (shape[0], 2), device="cuda")
    on_device(
        lambda seed: ops.philox_normal(seed, 3, shape, dtype),
        (seed,),
        _size(_normal(shape, dtype)),
        peer=lambda seed: torch.randn(shape, dtype=dtype, device=seed.device),
    )


@every_dtype
@every_shape(*LATENTS)
def bench_q_sample(on_device, shape, dtype) -> None:
    x0, noise = _normal((2, *shape), dtype)
    t = torch.randint(1000, shape[:1], device="cuda")
    tables = schedules.cosine().coefficients(x0.device, torch.float32)
    on_device(ops.q_sample, (x0, t, noise, *tables), 3 * _size(x0))


@every_dtype
@every_shape(*IMAGES)
@pytest.mark.parametrize("seeded", [False, True], ids=["", "seeded"])
def bench_denoising_loss(on_device, shape, dtype, seeded) -> None:
    """The loss for v and its gradient; "seeded" fastdiff computes the noise, peers read it."""
    prediction, x0, noise = _normal((3, *shape), dtype)
    t = torch.randint(1000, shape[:1], device="cuda")
    seed = torch.randint(2**62, (shape[0], 2), device="cuda")
    row = torch.zeros(1, dtype=torch.int64, device="cuda")
    signal, sigma = schedules.cosine().coefficients(x0.device, torch.float32)
    more = (t, -sigma, signal, torch.ones_like(signal))
    grad = torch.full(shape[:1], x0[0].numel(), dtype=torch.float32, device="cuda")

    def given(prediction, x0, noise):
        return ops.denoising_loss(prediction, x0, noise, *more)

    def from_seed(prediction, x0, noise):
        return ops.denoising_loss_from_seed(prediction, x0, seed, row, *more)

    def trained(loss_of):
        def run(prediction, x0, noise):
            with torch.enable_grad():
                leaf = prediction.detach().requires_grad_()
                loss = loss_of(leaf, x0, noise)
            return loss.detach(), *torch.autograd.grad(loss, leaf, grad)

        return run

    on_device(
        trained(from_seed if seeded else given),
        (prediction, x0, noise),
        (5 if seeded else 7) * _size(x0),
        compiled=trained(inductor(given)),
        peer=trained(given),
    )


@every_dtype
@every_shape(*LATENTS)
@pytest.mark.parametrize("name", ["ddim", "unipc-2"])
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
def bench_sampler_step(on_device, shape, dtype, name, guided) -> None:
    sampler = samplers.make(name, schedules.cosine(), steps=50).table
    x, model_out = _normal(shape, dtype), _normal((shape[0] * (1 + guided), *shape[1:]), dtype)
    history = ops.new_history(x, sampler.depth) if sampler.depth else None
    table, step = sampler.values.float().cuda(), torch.tensor([20], device="cuda")
    read = int((sampler.values[20, len(samplers.COLUMNS) :] != 0).sum())
    kept = 0 if history is None else (read + 1) * _size(history[0])
    on_device(
        lambda x, m: ops.sampler_step(x, m, history, None, table, step),
        (x, model_out),
        2 * _size(x) + _size(model_out) + kept,
    )


@every_dtype
def bench_ema_update(on_device, dtype) -> None:
    parameters = [_normal(shape, dtype) for shape in [(320, 320, 3, 3), (320,)] * 100]
    averages = [value.float() for value in parameters]
    weight = torch.tensor(1e-4, device="cuda")

    def update(*parameters):
        ops.ema_update(averages, parameters, weight)
        return averages

    on_device(update, tuple(parameters), 2 * _size(*averages) + _size(*parameters))
