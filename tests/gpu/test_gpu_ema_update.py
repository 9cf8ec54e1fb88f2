"""ema_update on the GPU kernels: values, memory, and the table that a captured graph reads."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import DTYPE_IDS, DTYPES

from fastdiff import ops

SHAPES = [(), (1,), (5,), (16,), (3, 5, 7), (2048,), (2049,), (64, 80), (0,)]
PAIRS = [
    pytest.param(a, p, id=f"{a_id} of {p_id}")
    for (a, a_id), (p, p_id) in itertools.product(zip(DTYPES, DTYPE_IDS, strict=True), repeat=2)
]


def make(gpu, shapes, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(gpu.device, dtype) for shape in shapes]


def assert_moved(found, a, p, weight):
    """To the error of one rounding to the average's dtype, and a few in float32."""
    exact = a.double() + weight * (p.double() - a.double())
    size = torch.maximum(a.double().abs(), p.double().abs())
    bound = 0.51 * torch.finfo(a.dtype).eps * exact.abs() + 4 * 2.0**-24 * size
    tiny = 2.0**-25 if a.dtype == torch.float16 else 0.0  # half of its smallest number
    assert ((found.double() - exact).abs() <= bound + tiny).all()


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("average", "parameter"), PAIRS)
def test_values(gpu, average, parameter, weight) -> None:
    averages, parameters = make(gpu, SHAPES, average, 0), make(gpu, SHAPES, parameter, 1)
    before, given = ([v.clone() for v in values] for values in (averages, parameters))
    rounded = torch.tensor(weight, device=gpu.device)
    ops.ema_update(averages, parameters, rounded)
    for found, a, p, same in zip(averages, before, given, parameters, strict=True):
        assert torch.equal(same, p)
        assert_moved(found, a, p, rounded.item())
        if weight in (0.0, 1.0):
            assert torch.equal(found, p.to(average) if weight else a)


def test_autograd_knows_what_was_written(gpu) -> None:
    averages, parameters = (make(gpu, [(40,), (3, 3)], torch.float32, seed) for seed in (0, 1))
    before = [value._version for value in averages + parameters]
    ops.ema_update(averages, parameters, 0.25)
    grown = [value._version > v for value, v in zip(averages + parameters, before, strict=True)]
    assert grown == [True, True, False, False]


def test_mixed_dtypes_in_one_call_and_a_number(gpu) -> None:
    averages = make(gpu, [(40,), (3, 3)], torch.float32, 0) + make(gpu, [(70,)], torch.float16, 1)
    parameters = make(gpu, [(40,)], torch.bfloat16, 2) + make(
        gpu, [(3, 3), (70,)], torch.float16, 3
    )
    before = [value.clone() for value in averages]
    ops.ema_update(averages, parameters, 0.25)
    for found, a, p in zip(averages, before, parameters, strict=True):
        assert_moved(found, a, p, 0.25)


def test_memory_in_any_place_and_order(gpu) -> None:
    """At no multiple of 16 bytes, channels-last or permuted alike; neighbours stay as they are."""
    memory, other = (torch.arange(200.0, device=gpu.device) + k for k in (0, 1000))
    plain = make(gpu, [(2, 3, 4, 5)], torch.float32, 0)[0]
    averages = [memory[3:40], memory[41:101].view(3, 4, 5).permute(2, 0, 1)]
    parameters = [other[1:38], other[50:110].view(3, 4, 5).permute(2, 0, 1)]
    averages.append(plain.clone(memory_format=torch.channels_last))
    parameters.append((plain + 1).contiguous(memory_format=torch.channels_last))
    before = [value.clone() for value in averages]
    ops.ema_update(averages, parameters, 0.5)
    for found, a, p in zip(averages, before, parameters, strict=True):
        assert_moved(found, a, p, 0.5)
    for untouched in (memory[:3], memory[40:41], memory[101:]):
        assert torch.equal(untouched, untouched.round())
        assert untouched.max() < 200


def test_again_and_in_other_memory(gpu) -> None:
    """The table of a list serves its next call; another list gets another."""
    lists = [(make(gpu, [(33,), (16,)], torch.float32, k), k + 1) for k in range(3)]
    parameters = make(gpu, [(33,), (16,)], torch.float32, 9)
    for _ in range(2):
        for averages, divisor in lists:
            before = [value.clone() for value in averages]
            ops.ema_update(averages, parameters, 1 / divisor)
            for found, a, p in zip(averages, before, parameters, strict=True):
                assert_moved(found, a, p, 1 / divisor)


def test_refuses_memory_of_two_orders_or_with_gaps(gpu) -> None:
    x = torch.zeros(2, 3, 4, 5, device=gpu.device)
    last = x.contiguous(memory_format=torch.channels_last)
    for a, p in ((x, last), (x[..., ::2], x[..., ::2].clone()), (x[:, ::2], last[:, ::2])):
        with pytest.raises(ValueError, match="strides"):
            torch.ops.fastdiff.ema_update([a], [p], torch.tensor(0.5, device=gpu.device))
    assert not x.any()


class TestTables:
    """Triton's own: the CUDA kernels' table is kept by their binding."""

    CUDA = torch.device("cuda")

    @pytest.fixture
    def module(self, gpu, monkeypatch):
        if not gpu.is_triton:
            pytest.skip("the table of the Triton kernels")
        module = pytest.importorskip("fastdiff.kernels.ema_update")
        monkeypatch.setattr(module, "_tables", type(module._tables)())
        monkeypatch.setattr(module, "_captured", {})
        return module

    @staticmethod
    def key(number, device):
        pair = (16 * number, 16 * number, torch.Size([4]), (1,), (1,))
        return (pair,), torch.float32, torch.float32, device

    def test_are_bounded_and_the_oldest_goes(self, module) -> None:
        cpu = torch.device("cpu")
        first = module._table(*self.key(1, cpu))
        for number in range(2, module._KEPT + 1):
            module._table(*self.key(number, cpu))
        assert module._table(*self.key(1, cpu)) is first
        module._table(*self.key(module._KEPT + 1, cpu))
        assert len(module._tables) == module._KEPT
        assert self.key(1, cpu) in module._tables
        assert self.key(2, cpu) not in module._tables

    def test_of_a_captured_graph_stay(self, module, monkeypatch) -> None:
        cpu = torch.device("cpu")
        table = module._table(*self.key(1, cpu))
        module._tables[self.key(1, self.CUDA)] = table
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert module._table(*self.key(1, self.CUDA)) is table
        for number in range(2, module._KEPT + 3):
            module._table(*self.key(number, cpu))
        assert module._table(*self.key(1, self.CUDA)) is table

    def test_are_not_made_during_capture(self, module, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="run once before capturing"):
            module._table(*self.key(1, self.CUDA))
