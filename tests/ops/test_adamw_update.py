"""adamw_update and gradient_norm: values, layouts, threads, and what they must refuse."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from accuracy import DTYPE_IDS, DTYPES, amid_nans

import fastdiff
from fastdiff import ops

CL = torch.channels_last
SHAPES = [(), (1,), (3, 5, 7), (64, 80), (0,), (33000,), (2, 3, 5, 4)]
WIDE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
NUMBERS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "step": 3}


def normal(shape, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    return value.contiguous(memory_format=CL) if value.ndim == 4 else value


def make(dtype=torch.float32, shapes=SHAPES):
    """Parameters, gradients, first and second moments and averages."""
    lists = [
        [normal(shape, 10 * index + which, dtype) for index, shape in enumerate(shapes)]
        for which in range(5)
    ]
    lists[3] = [value.square() for value in lists[3]]
    return lists


def formula(p, g, m, v, a, lr, betas, eps, weight_decay, step, factor=1.0, weight=0.0):
    """Algorithm 2 of the paper in float64, with its hats."""
    p, g, m, v, a = (value.double() for value in (p, g, m, v, a))
    g = g * factor
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    p = p - lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * p)
    return p, m, v, a + weight * (p - a)


def close(found, wanted, size):
    eps = torch.finfo(found.dtype).eps
    return bool(((found.double() - wanted).abs() <= 4 * eps * size.abs()).all())


@pytest.mark.parametrize("numbers", [{}, {"weight_decay": 0.0}, {"step": 1}, {"step": 100000},
                                     {"betas": (0.0, 0.0)}, {"lr": 0.0}, {"betas": (0.3, 0.9)}],
                         ids=str)  # fmt: skip
@WIDE
@BACKENDS
def test_values(backend, dtype, numbers) -> None:
    numbers = {**NUMBERS, **numbers}
    lists, before = make(dtype), make(dtype)
    with fastdiff.backend(backend):
        ops.adamw_update(*lists, gradient_factor=0.3, average_weight=0.2, **numbers)
    for old, new in zip(zip(*before, strict=True), zip(*lists, strict=True), strict=True):
        p, m, v, a = formula(*old, **numbers, factor=0.3, weight=0.2)
        assert torch.equal(new[1], old[1])  # the gradient is not written
        moments = [(old[2].abs() + old[1].abs()).double(), old[3] + old[1].square()]
        step = numbers["lr"] * moments[0] / (1 - numbers["betas"][0] ** numbers["step"])
        size = old[0].abs() + 4 * step / (
            (v / (1 - numbers["betas"][1] ** numbers["step"])).sqrt() + 1e-6
        )
        assert close(new[0], p, size)
        assert close(new[2], m, moments[0])
        assert close(new[3], v, moments[1])
        assert close(new[4], a, size + old[4].abs())


@WIDE
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_follows_torch(weight_decay, dtype) -> None:
    """Step after step, to a few roundings of a step and of the parameter."""
    p, _, m, v, _ = ([value.clone() for value in values] for values in make(dtype))
    m, v = ([torch.zeros_like(value) for value in values] for values in (m, v))
    leaves = [value.clone().requires_grad_() for value in p]
    theirs = torch.optim.AdamW(leaves, lr=0.01, weight_decay=weight_decay)
    for step in range(1, 6):
        gradients = [normal(value.shape, step, dtype) for value in p]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        theirs.step()
        ops.adamw_update(p, gradients, m, v, lr=0.01, weight_decay=weight_decay, step=step)
    eps = torch.finfo(dtype).eps
    for ours, leaf in zip(p, leaves, strict=True):
        assert ((ours - leaf).abs() <= 10 * eps * (0.1 + leaf.abs())).all()


@BACKENDS
def test_averages_are_not_needed(backend) -> None:
    *lists, averages = make()
    with fastdiff.backend(backend):
        ops.adamw_update(*lists, **NUMBERS)
        plain = [[value.clone() for value in values] for values in lists]
        *lists, averages = make()
        ops.adamw_update(*lists, averages, average_weight=1.0, **NUMBERS)
    assert all(all(map(torch.equal, a, b)) for a, b in zip(plain, lists, strict=True))
    assert all(map(torch.equal, averages, lists[0]))


def test_autograd_knows_what_was_written() -> None:
    lists = make()
    versions = [[value._version for value in values] for values in lists]
    lists[0][0].requires_grad_()
    ops.adamw_update(*lists, **NUMBERS)
    for which, (values, before) in enumerate(zip(lists, versions, strict=True)):
        grown = [value._version > v for value, v in zip(values, before, strict=True)]
        assert grown == [which != 1] * len(values)
    assert lists[0][0].is_leaf


def test_threads_and_neighbours_do_not_change_the_bits() -> None:
    shapes = [(7,), (200, 300), (3, 3), (70001,), (1,)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            lists = make(shapes=shapes)
            ops.adamw_update(*lists, average_weight=0.3, **NUMBERS)
            values = [*chain(*lists)]
            results.append([*values, ops.gradient_norm(values)])
    finally:
        torch.set_num_threads(threads)
    alone = make(shapes=shapes)
    for members in zip(*alone, strict=True):
        ops.adamw_update(*[[value] for value in members], average_weight=0.3, **NUMBERS)
    alone = [*chain(*alone), results[0][-1]]
    assert all(all(map(torch.equal, alone, other)) for other in results)


def test_touches_nothing_beside_its_tensors() -> None:
    plain, lists = make(), [[amid_nans(value) for value in values] for values in make()]
    ops.adamw_update(*plain, average_weight=0.3, **NUMBERS)
    ops.adamw_update(*lists, average_weight=0.3, **NUMBERS)
    for values, guarded in zip(plain, lists, strict=True):
        for value, other in zip(values, guarded, strict=True):
            assert torch.equal(value, other)
            memory = other.as_strided((other.numel() + 128,), (1,), 0)
            assert memory.isnan().sum() == 128


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@BACKENDS
def test_norm(backend, dtype) -> None:
    values = [normal(shape, 3, dtype) for shape in SHAPES]
    with fastdiff.backend(backend):
        found = ops.gradient_norm(values)
    wanted = math.sqrt(sum(value.double().square().sum().item() for value in values))
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert abs(found.item() - wanted) <= 1e-6 * wanted


def test_norm_of_what_is_large_beside_much_that_is_small() -> None:
    """A sum in float32 would lose all but the first."""
    values = [torch.full((1,), 4096.0), torch.ones(2**20)]
    assert ops.gradient_norm(values).item() == pytest.approx(math.sqrt(2**24 + 2**20), rel=1e-9)


@BACKENDS
def test_norm_of_other_layouts_and_dtypes(backend) -> None:
    value = normal((6, 8, 5, 4), 0)
    values = [value[:, ::2], value[:, 1::2].double(), value.mT.bfloat16()]
    with fastdiff.backend(backend):
        found = ops.gradient_norm(values).item()
    wanted = math.sqrt(sum(part.double().square().sum().item() for part in values))
    assert found == pytest.approx(wanted, rel=1e-6)


@BACKENDS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_norm_shows_what_is_not_finite(bad, backend) -> None:
    values = make()[1]
    values[3][5, 7] = bad
    with fastdiff.backend(backend):
        assert not torch.isfinite(ops.gradient_norm(values))


def test_nothing_to_do() -> None:
    ops.adamw_update([], [], [], [], **NUMBERS)
    assert ops.gradient_norm([]).item() == 0
    assert ops.gradient_norm([torch.empty(0)]).item() == 0


def test_opcheck() -> None:
    lists = make(shapes=[(4,), (3, 3)])
    numbers = (0.1, 0.9, 0.99, 1e-8, 0.01, 2, 0.5, 0.25)
    torch.library.opcheck(torch.ops.fastdiff.adamw_update.default, (*lists, *numbers))
    torch.library.opcheck(torch.ops.fastdiff.gradient_norm.default, (lists[1],))


ONE, TWO = torch.ones(3), torch.ones(2)


def update(p=ONE, g=ONE, m=ONE, v=ONE, a=None, **numbers):
    """A step on copies."""
    lists = [[value.clone()] for value in (p, g, m, v)] + [[] if a is None else [a.clone()]]
    ops.adamw_update(*lists, **{**NUMBERS, **numbers})


REFUSED = {
    "fewer gradients": (lambda: ops.adamw_update([ONE], [], [ONE], [ONE], **NUMBERS), ValueError,
                        "as many gradients as parameters, got 0 and 1"),
    "more averages": (lambda: ops.adamw_update(*[[ONE]] * 4, [ONE, ONE], **NUMBERS), ValueError,
                      "got 2 and 1"),
    "gradient": (lambda: update(g=TWO), ValueError, r"gradients\[0\] must have the shape"),
    "first moment": (lambda: update(m=TWO), ValueError, r"exp_avgs\[0\]"),
    "second moment": (lambda: update(v=TWO), ValueError, r"exp_avg_sqs\[0\]"),
    "average": (lambda: update(a=TWO), ValueError, r"averages\[0\]"),
    "gradient of another dtype": (lambda: update(g=ONE.double()), TypeError, "float64"),
    "half": (lambda: update(*[ONE.half()] * 4), TypeError, "float32 or float64, got torch.float16"),
    "integers": (lambda: update(*[ONE.long()] * 4), TypeError, "int64"),
    "step": (lambda: update(step=0), ValueError, "from 1, got 0"),
    "beta": (lambda: update(betas=(0.9, 1.0)), ValueError, "1.0"),
    "weight": (lambda: update(a=ONE, average_weight=1.5), ValueError, "in 0..1, got 1.5"),
    "norm of integers": (lambda: ops.gradient_norm([ONE, ONE.long()]), TypeError,
                         r"gradients\[1\] must be floating point, got torch.int64"),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "message"), REFUSED.values(), ids=REFUSED)
@BACKENDS
def test_refusals(backend, bad, error, message) -> None:
    with fastdiff.backend(backend), pytest.raises(error, match=message):
        bad()


@pytest.mark.parametrize("which", [1, 2, 3, 4])
def test_another_layout_is_refused(which) -> None:
    """Else a weight would be moved by what belongs to another."""
    value = normal((4, 3, 5, 6), 0)
    tensors = [value.clone() for _ in range(5)]
    tensors[which] = tensors[which].contiguous()
    with pytest.raises(ValueError, match="must lie in memory as its parameter"):
        update(*tensors)
    gaps = [torch.randn(4, 10)[:, ::2]]
    with pytest.raises(ValueError, match="must lie in memory"):
        ops.adamw_update(*[gaps] * 4, **NUMBERS)


S = (0.1, 0.9, 0.99, 1e-8, 0.01)
STRAIGHT = {
    "fewer": lambda op: op([ONE], [], [ONE], [ONE], [], *S, 2, 1.0, 0.0),
    "shape": lambda op: op([ONE], [TWO], [ONE], [ONE], [], *S, 2, 1.0, 0.0),
    "average": lambda op: op([ONE], [ONE], [ONE], [ONE], [TWO], *S, 2, 1.0, 0.0),
    "dtype": lambda op: op([ONE], [ONE.double()], [ONE], [ONE], [], *S, 2, 1.0, 0.0),
    "second dtype": lambda op: op([ONE, ONE.double()], *[[ONE, ONE]] * 3, [], *S, 2, 1.0, 0.0),
    "half": lambda op: op(*[[ONE.half()]] * 4, [], *S, 2, 1.0, 0.0),
    "step": lambda op: op(*[[ONE]] * 4, [], *S, 0, 1.0, 0.0),
    "beta": lambda op: op(*[[ONE]] * 4, [], 0.1, 1.0, *S[2:], 2, 1.0, 0.0),
}


@pytest.mark.parametrize("bad", STRAIGHT.values(), ids=STRAIGHT)
def test_the_kernel_checks_for_itself(bad) -> None:
    with pytest.raises((TypeError, ValueError)):
        bad(torch.ops.fastdiff.adamw_update)
    with pytest.raises(TypeError):
        torch.ops.fastdiff.gradient_norm([ONE.long()])
