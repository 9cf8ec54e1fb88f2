"""geglu and its gradient: values, extremes, layouts, and what they must refuse or let through."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from accuracy import CountCalls, amid_nans, assert_as_accurate, upstream
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff import ops

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16)
DTYPE_IDS = ("f32", "bf16")
SHAPES = {
    "one": (2,), "a vector": (74,), "odd width": (3, 5, 2 * 37), "width 1": (7, 2),
    "width 8": (5, 16), "width 16": (5, 32), "width 17": (5, 34), "images": (2, 3, 4, 10),
    "wide": (2, 2560), "many rows": (3, 700, 26), "no rows": (0, 8), "no width": (3, 0),
}  # fmt: skip


def make(shape, dtype=torch.float32, seed=0, scale=2.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=g)).to(dtype)


def call(x: Tensor) -> list[Tensor]:
    return [ops.geglu(x)]


def differentiate(x: Tensor, grad: Tensor) -> list[Tensor]:
    """The gradient of x where that of the result is ``grad``."""
    leaf = x.detach().requires_grad_()
    return list(torch.autograd.grad(ops.geglu(leaf), leaf, grad))


def gradient_of_result(x: Tensor) -> Tensor:
    return upstream(x[..., : x.shape[-1] // 2])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_values(dtype, shape) -> None:
    assert_as_accurate(call, make(shape, dtype))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_values_of_the_gradient(dtype, shape) -> None:
    x = make(shape, dtype)
    assert_as_accurate(differentiate, x, gradient_of_result(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_the_gradient_errs_at_most_twice_as_much_as_pytorch(dtype) -> None:
    x = make((300, 2 * 37), dtype)
    grad = gradient_of_result(x)

    def eager(x: Tensor, grad: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        a, b = leaf.chunk(2, dim=-1)
        return torch.autograd.grad(a * F.gelu(b), leaf, grad)[0]

    exact = eager(x.double(), grad.double())
    theirs = (eager(x, grad).double() - exact).norm()
    assert (differentiate(x, grad)[0].double() - exact).norm() <= 2 * theirs


def test_gradients_of_the_reference_in_float64() -> None:
    x = make((3, 10)).double().requires_grad_()
    assert torch.autograd.gradcheck(ops.geglu, x)
    assert torch.autograd.gradgradcheck(ops.geglu, x)


def test_values_are_those_of_the_module() -> None:
    x = make((3, 5, 26))
    a, b = x.double().chunk(2, dim=-1)
    wanted = a * F.gelu(b)
    torch.testing.assert_close(ops.geglu(x).double(), wanted, rtol=1e-5, atol=5e-6)
    with fastdiff.backend("reference"):
        torch.testing.assert_close(ops.geglu(x.double()), wanted, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_sweep_of_gates(dtype) -> None:
    """Each error relative to the gate's size, so that the tail counts too."""
    gates = torch.linspace(-12, 12, 20001).to(dtype)
    y = ops.geglu(torch.cat([torch.ones_like(gates), gates])).double()
    unit = torch.finfo(dtype).eps * gates.double().abs()
    assert bool(((y - F.gelu(gates.double())).abs() <= 2 * unit).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_sweep_of_the_gradients_of_gates(dtype) -> None:
    """Of a gate and of the value beside it, each error relative to its own size."""
    gates = torch.linspace(-12, 12, 20001).to(dtype)
    ones = torch.ones_like(gates)
    found = differentiate(torch.cat([ones, gates]), ones)[0].double()
    wanted = differentiate(torch.cat([ones, gates]).double(), ones.double())[0]
    # Near the gate whose gradient is zero, about -0.75, two terms of 0.23 cancel.
    size = torch.cat([gates.double().abs(), wanted[20001:].abs() + 0.5])
    assert bool(((found - wanted).abs() <= 2 * torch.finfo(dtype).eps * size).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_what_is_not_finite(dtype) -> None:
    big = torch.finfo(dtype).max
    gates = [torch.nan, torch.inf, -torch.inf, big, -big, 0.0, 1.0, 1e-40, -30.0] * 3
    values = [1.0] * 9 + [torch.nan] * 9 + [torch.inf] * 9
    x = torch.tensor([values + gates, gates + values]).to(dtype)
    grads = torch.tensor([[1.0, -2.0, torch.nan] * 9, [torch.inf, 0.0, -torch.inf] * 9]).to(dtype)
    with fastdiff.backend("reference"):
        wanted = ops.geglu(x)
        (wanted_gradient,) = differentiate(x, grads)
    torch.testing.assert_close(ops.geglu(x), wanted, equal_nan=True, rtol=1e-2, atol=1e-5)
    (gradient,) = differentiate(x, grads)
    torch.testing.assert_close(gradient, wanted_gradient, equal_nan=True, rtol=1e-2, atol=1e-5)


VIEWS = {
    "rows apart": lambda t: t.view(6, 60)[:, :26],
    "every other value": lambda t: t.view(6, 60)[:, ::2],
    "transposed": lambda t: t.view(60, 6).T,
    "channels-last": lambda t: t.view(2, 3, 6, 10).permute(0, 3, 2, 1)[..., :2],
    "rows repeated": lambda t: t[:60].expand(4, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_strides_do_not_change_the_bits(dtype, view) -> None:
    x = view(make((360,), dtype))
    before = x.clone()
    y = ops.geglu(x)
    assert y.is_contiguous()
    assert torch.equal(y, ops.geglu(x.contiguous()))
    grad = gradient_of_result(y.new_empty(x.shape))
    apart = grad.mT.contiguous().mT if grad.ndim > 1 else grad
    (dx,) = differentiate(x, apart)
    assert dx.is_contiguous()
    assert torch.equal(dx, differentiate(x.contiguous(), grad)[0])
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_reads_nothing_beside_its_input(dtype) -> None:
    x = make((3, 5, 2 * 37), dtype)
    assert torch.equal(ops.geglu(amid_nans(x)), ops.geglu(x))
    grad, run = gradient_of_result(x), torch.ops.fastdiff.geglu_backward
    assert torch.equal(run(amid_nans(grad), amid_nans(x)), run(grad, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["f64", "f16"])
def test_other_dtypes_are_computed_by_the_reference(dtype) -> None:
    x = make((3, 26), dtype)
    with CountCalls() as counted:
        y = ops.geglu(x)
    assert not any(name.startswith("fastdiff") for name in counted.names)
    assert y.dtype == dtype
    assert y.is_contiguous()


def test_is_one_dispatcher_call() -> None:
    x = make((3, 26))
    with CountCalls() as counted:
        ops.geglu(x)
    assert counted.names == ["fastdiff.geglu.default"]


def test_its_gradient_is_one_more() -> None:
    x = make((3, 26)).requires_grad_()
    with CountCalls() as counted:
        y = ops.geglu(x)
        y.backward(torch.ones_like(y))
    ours = [name for name in counted.names if name.startswith("fastdiff")]
    assert ours == ["fastdiff.geglu.default", "fastdiff.geglu_backward.default"]


def test_a_second_derivative_is_refused() -> None:
    x = make((3, 26)).requires_grad_()
    (dx,) = torch.autograd.grad(ops.geglu(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"geglu_backward .* PyTorch's eager mode"):
        dx.sum().backward()


def test_compiles_whole() -> None:
    x = make((3, 5, 26)).requires_grad_()
    compiled = torch.compile(ops.geglu, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(found, differentiate(x, torch.ones(3, 5, 13))[0])


def test_threads_do_not_change_the_bits() -> None:
    x, results = make((3, 700, 26)), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append((ops.geglu(x), *differentiate(x, gradient_of_result(x))))
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


def test_calls_from_several_threads_at_once() -> None:
    calls = [make(shape, seed=seed) for seed, shape in enumerate(SHAPES.values())] * 3
    wanted = [ops.geglu(x) for x in calls]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(ops.geglu, calls), wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", ["odd width", "a vector", "no rows"])
def test_opcheck(shape, dtype) -> None:
    x = make(SHAPES[shape], dtype)
    torch.library.opcheck(torch.ops.fastdiff.geglu.default, (x.clone().requires_grad_(),))
    grad = gradient_of_result(x)
    torch.library.opcheck(torch.ops.fastdiff.geglu_backward.default, (grad, x))


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3), width=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES), scale=st.floats(0.125, 30),
)  # fmt: skip
def test_any_shape(shape, width, dtype, scale) -> None:
    x = make((*shape, 2 * width), dtype, scale=scale)
    a, b = x.double().chunk(2, dim=-1)
    # csrc/cpu/kernels/activations.h: the formula itself is off by 5e-9 of the gate.
    formula = 5e-9 * (a * b).abs().max().item() if x.numel() else 0.0
    assert_as_accurate(call, x, formula=formula)
    assert_as_accurate(differentiate, x, gradient_of_result(x), formula=formula)


REFUSED = {
    "integers": (torch.ones(4).long(), TypeError, "x must be floating point, got torch.int64"),
    "odd": (torch.ones(3, 5), ValueError, r"x must be \[..., 2D\], got \(3, 5\)"),
    "a number": (torch.ones(()), ValueError, r"x must be \[..., 2D\], got \(\)"),
    "sparse": (torch.ones(2, 4).to_sparse(), TypeError, "dense tensor"),
}


@pytest.mark.parametrize(("x", "error", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(backend, x, error, message) -> None:
    with fastdiff.backend(backend), pytest.raises(error, match=message):
        ops.geglu(x)


@pytest.mark.parametrize(
    "x", [torch.ones(4).long(), torch.ones(4).double(), torch.ones(3, 5), torch.ones(())], ids=str
)
def test_the_kernel_checks_for_itself(x) -> None:
    with pytest.raises((TypeError, ValueError)):
        torch.ops.fastdiff.geglu(x)


@pytest.mark.parametrize(
    "grad",
    [torch.ones(3, 3), torch.ones(3, 4), torch.ones(4), torch.ones(3, 2).bfloat16()],
    ids=lambda value: f"{value.dtype} {list(value.shape)}",
)
def test_the_kernel_checks_the_gradient(grad) -> None:
    with pytest.raises((TypeError, ValueError)):
        torch.ops.fastdiff.geglu_backward(grad, torch.ones(3, 4))
