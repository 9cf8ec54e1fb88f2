"""conv_epilogue on the GPU kernels: the sum, and the statistics of what was stored."""

from __future__ import annotations

import pytest
import torch
from accuracy import LAYOUT_IDS, LAYOUTS
from conftest import DTYPE_IDS, DTYPES
from gpu_accuracy import assert_close_to_oracle

from fastdiff import ops

SHAPES = {
    "whole vectors": (2, 32, 8, 8),
    "odd": (2, 37, 5, 7),
    "short rows": (1, 24, 2, 4),
    "one pixel": (2, 13, 1, 1),
    "one channel": (2, 1, 6, 6),
    "latent": (1, 4, 12, 8),
}
OPTIONS = {
    "bias": (1, 0, 0),
    "emb": (0, 1, 0),
    "residual": (0, 0, 1),
    "all": (1, 1, 1),
    "nothing": (0, 0, 0),
}
epilogue = torch.ops.fastdiff.conv_epilogue


def make(gpu, shape, dtype, layout=torch.contiguous_format, options=(1, 1, 1)):
    g = torch.Generator().manual_seed(0)

    def normal(shape):
        return torch.randn(shape, generator=g).to(gpu.device, dtype)

    x, residual = (normal(shape).contiguous(memory_format=layout) for _ in range(2))
    others = (normal(shape[1:2]), normal(shape[:2]), residual)
    return x, *(v if wanted else None for v, wanted in zip(others, options, strict=True))


def assert_statistics_of(y, statistics, spans):
    """Those of y in float64, to float32's precision of the deviation."""
    values = y.double().flatten(2) if y.ndim > 2 else y.double()[..., None]
    length = -(-values.shape[2] // spans)
    assert statistics.shape == (y.shape[0], spans, 4, y.shape[1])
    assert statistics.dtype == torch.float32
    for span in range(spans):
        part = values[..., span * length : (span + 1) * length]
        count, mean, remainder, m2 = statistics[:, span].double().unbind(1)
        assert (count == part.shape[2]).all()
        if part.shape[2] == 0:
            assert not statistics[:, span].any()
            continue
        deviation = part.std(2, correction=0)
        assert ((mean + remainder - part.mean(2)).abs() <= 2e-7 * deviation).all()
        assert (remainder.abs() <= 2.0**-23 * mean.abs() + 1e-30).all()
        torch.testing.assert_close(m2, part.shape[2] * deviation**2, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(gpu, shape, dtype, layout) -> None:
    values = [value.requires_grad_() for value in make(gpu, shape, dtype, layout)]

    def run(x, *others):
        y, _ = ops.conv_epilogue(x, *others)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *others))]

    assert_close_to_oracle(run, *values)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_and_one_rounding(gpu, options, dtype, layout) -> None:
    """With statistics or without, to the last bit the same, half a unit from the exact sum."""
    x, bias, emb, residual = make(gpu, (2, 20, 3, 4), dtype, layout, options)
    y, nothing = epilogue(x, bias, emb, residual, 0)
    assert nothing.shape == (0,)
    assert y.stride() == x.stride()
    exact, size = x.double(), x.double().abs()
    for value in (
        bias[None, :, None, None] if bias is not None else None,
        emb[:, :, None, None] if emb is not None else None,
        residual,
    ):
        if value is not None:
            exact, size = exact + value.double(), size + value.double().abs()
    bound = 0.5 * torch.finfo(dtype).eps * exact.abs() + 3 * 2.0**-24 * size
    assert ((y.double() - exact).abs() <= bound).all()
    again, statistics = epilogue(x, bias, emb, residual, 1)
    assert torch.equal(again, y)
    assert_statistics_of(y, statistics, 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("spans", [2, 11])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_spans(gpu, shape, spans, layout) -> None:
    """Even ones and odd ones, more than there are pixels, and empty ones at the end."""
    x, bias, emb, residual = make(gpu, shape, torch.bfloat16, layout)
    y, statistics = epilogue(x, bias, emb, residual, spans)
    assert_statistics_of(y, statistics, spans)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("shape", [(1, 3, 70, 130), (1, 40, 20, 36)], ids=str)
def test_a_span_of_several_tiles(gpu, shape, layout) -> None:
    x, bias, emb, _ = make(gpu, shape, torch.float32, layout)
    y, statistics = epilogue(x, bias, emb, None, 1)
    assert_statistics_of(y, statistics, 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_a_large_mean_does_not_cost_the_deviation(gpu, layout) -> None:
    x, bias, _, _ = make(gpu, (2, 8, 24, 24), torch.float32, layout)
    y, statistics = epilogue(x * 0.1, bias * 0 + 1e4, None, None, 2)
    assert_statistics_of(y, statistics, 2)


def test_every_run_gives_the_same_bits(gpu) -> None:
    x, bias, emb, residual = make(gpu, (1, 6, 40, 30), torch.float32)
    first, second = (epilogue(x, bias, emb, residual, 4) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("spans", [0, 2])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 10), (2, 3, 2, 3, 4)], ids=str)
def test_other_numbers_of_dimensions(gpu, shape, spans) -> None:
    x, bias, emb, residual = make(gpu, shape, torch.float32)
    y, statistics = epilogue(x, bias, emb, residual, spans)
    rest = [1] * (len(shape) - 2)
    wanted = x + bias.view(1, -1, *rest) + emb.view(*emb.shape, *rest) + residual
    torch.testing.assert_close(y, wanted)
    if spans:
        assert_statistics_of(y, statistics, spans)


def test_strides(gpu) -> None:
    x, bias, emb, residual = make(gpu, (2, 12, 5, 6), torch.float32, torch.channels_last)
    parts = (x[:, ::2], bias[::2], emb[:, ::2], residual.contiguous()[:, ::2])
    y, statistics = epilogue(*parts, 2)
    assert torch.equal(y, epilogue(*(part.contiguous() for part in parts), 0)[0])
    assert_statistics_of(y, statistics, 2)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_nothing(gpu, shape) -> None:
    x, bias, emb, residual = make(gpu, shape, torch.float32)
    y, statistics = epilogue(x, bias, emb, residual, 2)
    assert y.shape == shape
    assert statistics.shape == (shape[0], 2, 4, shape[1])
    assert not statistics.any()
