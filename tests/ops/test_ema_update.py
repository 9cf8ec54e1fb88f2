"""ema_update on CPU tensors: values, memory and refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import DTYPE_IDS, DTYPES

from fastdiff import ops

ONE, TWO, WEIGHT = torch.ones(3), torch.ones(2), torch.tensor(0.5)
SHAPES = [(), (1,), (3, 5, 7), (64, 80), (0,)]
PAIRS = [
    pytest.param(a, p, id=f"{a_id} of {p_id}")
    for (a, a_id), (p, p_id) in itertools.product(zip(DTYPES, DTYPE_IDS, strict=True), repeat=2)
]


def make(shapes, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("average", "parameter"), PAIRS)
def test_values(average, parameter, weight) -> None:
    """To one rounding to the average's dtype and a few of the arithmetic."""
    averages, parameters = make(SHAPES, average, 0), make(SHAPES, parameter, 1)
    before, given = ([v.clone() for v in values] for values in (averages, parameters))
    number = torch.tensor(weight)
    ops.ema_update(averages, parameters, number)
    for found, a, p, same in zip(averages, before, given, parameters, strict=True):
        assert torch.equal(same, p)
        exact = a.double() + number.double() * (p.double() - a.double())
        size = torch.maximum(a.double().abs(), p.double().abs())
        bound = 0.51 * torch.finfo(average).eps * exact.abs() + 4 * 2.0**-24 * size
        tiny = 2.0**-25 if average == torch.float16 else 0.0  # half of its smallest number
        assert ((found.double() - exact).abs() <= bound + tiny).all()
        if weight in (0.0, 1.0):
            assert torch.equal(found, p.to(average) if weight else a)


def test_a_number_is_a_weight_too_and_autograd_knows_what_was_written() -> None:
    averages, parameters = (make([(40,), (3, 3)], torch.float32, seed) for seed in (0, 1))
    others = [value.clone() for value in averages]
    versions = [value._version for value in averages + parameters]
    ops.ema_update(averages, parameters, 0.25)
    grown = [value._version > v for value, v in zip(averages + parameters, versions, strict=True)]
    assert grown == [True, True, False, False]
    ops.ema_update(others, parameters, torch.tensor(0.25))
    assert all(map(torch.equal, averages, others))


def test_it_is_not_recorded() -> None:
    average, parameter = torch.zeros(3), torch.ones(3, requires_grad=True)
    ops.ema_update([average], [parameter], 0.5)
    assert average.tolist() == [0.5] * 3
    assert not average.requires_grad


LAST = torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last)
LAYOUTS = {
    "channels-last": (LAST.clone(), LAST * 2),
    "one channels-last": (LAST.contiguous(), LAST * 2),
    "average with gaps": (torch.randn(4, 10)[:, ::2], torch.randn(4, 5)),
    "parameter with gaps": (torch.randn(4, 5), torch.randn(4, 10)[:, ::2]),
    "transposed": (torch.randn(5, 4).mT, torch.randn(4, 5)),
    "a parameter of one value": (torch.randn(4, 5), torch.randn(1, 1).expand(4, 5)),
}


@pytest.mark.parametrize(("average", "parameter"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(average, parameter) -> None:
    average = average.as_strided(average.shape, average.stride()).clone(
        memory_format=torch.preserve_format
    )
    wanted = average + 0.25 * (parameter - average)
    ops.ema_update([average], [parameter], 0.25)
    torch.testing.assert_close(average, wanted)


def test_writes_nothing_beside_an_average_with_gaps() -> None:
    memory = torch.zeros(4, 10)
    ops.ema_update([memory[:, ::2]], [torch.ones(4, 5)], 0.5)
    assert torch.equal(memory[:, ::2], torch.full((4, 5), 0.5))
    assert torch.equal(memory[:, 1::2], torch.zeros(4, 5))


def test_threads_and_neighbours_do_not_change_the_bits() -> None:
    shapes = [(7,), (200, 300), (3, 3), (70001,), (1,)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            averages = make(shapes, torch.float32, 0)
            ops.ema_update(averages, make(shapes, torch.float32, 1), 0.3)
            results.append(averages)
    finally:
        torch.set_num_threads(threads)
    alone = make(shapes, torch.float32, 0)
    for a, p in zip(alone, make(shapes, torch.float32, 1), strict=True):
        ops.ema_update([a], [p], 0.3)
    assert all(all(map(torch.equal, alone, other)) for other in results)


STRAIGHT = {
    "fewer parameters": lambda op: op([ONE, ONE], [ONE], WEIGHT),
    "another shape": lambda op: op([ONE], [TWO], WEIGHT),
    "integers": lambda op: op([ONE.long()], [ONE], WEIGHT),
    "integer parameters": lambda op: op([ONE], [ONE.int()], WEIGHT),
    "weight of another dtype": lambda op: op([ONE], [ONE], WEIGHT.double()),
    "two weights": lambda op: op([ONE], [ONE], TWO),
}


@pytest.mark.parametrize("bad", STRAIGHT.values(), ids=STRAIGHT)
def test_the_kernel_checks_for_itself(bad) -> None:
    with pytest.raises((TypeError, ValueError)):
        bad(torch.ops.fastdiff.ema_update)


def test_nothing_to_do() -> None:
    ops.ema_update([], [], 0.5)


def test_opcheck() -> None:
    averages, parameters = (make([(4,), (3, 3)], torch.float32, seed) for seed in (0, 1))
    arguments = (averages, parameters, torch.tensor(0.5))
    torch.library.opcheck(torch.ops.fastdiff.ema_update.default, arguments)


REFUSED = {
    "no averages": (([], [ONE], 0.5), ValueError, "no averages"),
    "fewer parameters": (([ONE, ONE], [ONE], 0.5), ValueError, "got 2 and 1"),
    "another shape": (([ONE], [TWO], 0.5), ValueError, r"averages\[0\]"),
    "integers": (([ONE.long()], [ONE], 0.5), TypeError, "int64"),
    "weight above 1": (([ONE], [ONE], 1.5), ValueError, "1.5"),
    "weight of another dtype": (([ONE], [ONE], TWO[:1].double()), TypeError, "float64"),
    "two weights": (([ONE], [ONE], TWO), TypeError, r"\(2,\)"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        ops.ema_update(*arguments)
