"""The gradients of attention: values, hard scores, layouts, and what they must refuse."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from accuracy import CountCalls, amid_nans, assert_as_accurate, upstream
from attention_cases import BAD, DTYPE_IDS, DTYPES, SCORES, SHAPES, TAILS, VIEWS, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff import ops

pytestmark = pytest.mark.usefixtures("one_thread")

# B, H, L, S, D, D'; the kernels take 64 queries and 256 keys at a time, and divide the keys of few
# heads into shares.
LONG = {
    "63 queries": (1, 2, 63, 9, 8, 8),
    "65 queries": (1, 2, 65, 9, 8, 8),
    "16 heads of many keys": (4, 4, 70, 600, 8, 8),
    "one head in three shares": (1, 1, 70, 700, 24, 24),
    "one head in more blocks than shares": (1, 1, 70, 256 * 17 + 5, 3, 5),
}


def differentiate(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float | None = None
) -> list[Tensor]:
    """The gradients of q, k and v."""
    leaves = [value.detach().requires_grad_() for value in (q, k, v)]
    return list(torch.autograd.grad(ops.attention(*leaves, scale), leaves, dout))


def rounding(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float, u: float
) -> tuple[Tensor, Tensor, Tensor]:
    """How far dq, dk and dv go by what a kernel rounds on the way, root mean square, in float64.

    It multiplies the softmax P, the gradients dS of the scores and the result rounded to u, and
    sums up dP = dout v^T and delta = sum(dout * out), whose difference is in dS, in float32.
    """
    q, k, v, dout = (value.double() for value in (q, k, v, dout))
    weights = (q @ k.mT * scale).softmax(3)
    out, above = weights @ v, dout @ v.mT
    delta = (dout * out).sum(3, keepdim=True)
    of_delta = (dout * out).square().sum(3, keepdim=True) * u**2
    of_scores = (weights * (above - delta) * u).square()
    unit = torch.finfo(torch.float32).eps
    cancelled = weights * (dout.abs() @ v.abs().mT) * unit
    dq = of_scores @ k.square() + of_delta * (weights @ k).square()
    dk = (of_scores + of_delta * weights.square()).mT @ q.square()
    dv = (weights * u).square().mT @ dout.square()
    return (
        abs(scale) * (dq.sqrt() + cancelled @ k.abs()),
        abs(scale) * (dk.sqrt() + cancelled.mT @ q.abs()),
        dv.sqrt(),
    )


def judge(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> None:
    """Hold the gradients to twice what rounding explains.

    Those of float32 each to their largest error, those of bfloat16, where single errors would be a
    matter of luck, to their root mean square.
    """
    dout = upstream(q.new_empty((*q.shape[:3], v.shape[3])))
    factor = scale if scale is not None else q.shape[3] ** -0.5 if q.shape[3] else 1.0
    if q.dtype == torch.float32:
        terms = max(k.shape[2], q.shape[2])
        for index, error in enumerate(rounding(q, k, v, dout, factor, 0)):
            assert_as_accurate(
                lambda *tensors, index=index: [differentiate(*tensors, factor)[index]],
                q, k, v, dout, cancelling=True, terms=terms,
                formula=float(error.max()) if error.numel() else 0.0,
            )  # fmt: skip
        return
    u = torch.finfo(torch.bfloat16).eps / 4  # half the largest relative error of a rounding
    exact = differentiate(*(value.double() for value in (q, k, v, dout)), factor)
    found = differentiate(q, k, v, dout, factor)
    for ours, right, error in zip(found, exact, rounding(q, k, v, dout, factor, u), strict=True):
        assert bool(torch.isfinite(ours).all())
        explained = float((error + u * right.abs()).norm())
        assert float((ours.double() - right).norm()) <= 2 * explained


@pytest.mark.parametrize("shape", [*SHAPES.values(), *LONG.values()], ids=[*SHAPES, *LONG])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_values(dtype, shape) -> None:
    judge(*make(shape, dtype))


@pytest.mark.parametrize("shape", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_values_of_tails(dtype, shape) -> None:
    for n in range(1, 34):
        judge(*make(shape(n), dtype))


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 160], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_values_of_widths(dtype, width) -> None:
    judge(*make((1, 2, 70, 90, width, width), dtype))
    judge(*make((1, 2, 70, 90, width, 24), dtype))


SELF = [(1, 2, 100, 100, 40, 40), (2, 1, 64, 64, 80, 80), (1, 1, 16, 16, 256, 256)]


@pytest.mark.parametrize("shape", [*SELF, (1, 2, 100, 300, 40, 40)], ids=str)
@pytest.mark.parametrize("factor", [0.1, 1, 4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_errs_at_most_twice_as_much_as_pytorch(dtype, factor, shape) -> None:
    """In the root mean square of all values of each gradient."""
    q, k, v = make(shape, dtype)
    q, dout = q * factor, upstream(q)
    exact = differentiate(*(value.double() for value in (q, k, v, dout)))
    leaves = [value.clone().requires_grad_() for value in (q, k, v)]
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, dout)
    for ours, their, right in zip(differentiate(q, k, v, dout), theirs, exact, strict=True):
        assert (ours.double() - right).norm() <= 2 * (their.double() - right).norm()


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.5, 3e-3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_scales(dtype, scale) -> None:
    judge(*make((2, 2, 33, 270, 13, 13), dtype), scale=scale)


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_hard_scores(dtype, scores) -> None:
    q, k, v = make((1, 2, 50, 600, 16, 16))
    q, k = (value.to(dtype) for value in scores(q, k))
    judge(q, k, v.to(dtype))


@pytest.mark.parametrize(("which", "where", "bad"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_what_is_not_finite(dtype, which, where, bad) -> None:
    """Shows where it shows in the gradients of PyTorch's softmax(q k^T) v."""
    tensors = [value.abs().to(dtype) for value in make((1, 2, 50, 600, 8, 5))]
    tensors[which][where] = bad
    dout = upstream(tensors[0][..., :5])
    found = differentiate(*tensors, dout, 0.5)
    with fastdiff.backend("reference"):
        wanted = differentiate(*(value.float() for value in tensors), dout.float(), 0.5)
    for ours, right in zip(found, wanted, strict=True):
        assert torch.equal(ours.isnan(), right.isnan())
        torch.testing.assert_close(
            ours.double(), right.double(), rtol=0.03, atol=0.03, equal_nan=True, check_dtype=False
        )


def test_are_those_of_the_reference_in_float64() -> None:
    q, k, v = (value.double().requires_grad_() for value in make((1, 2, 5, 7, 3, 4)))
    assert torch.autograd.gradcheck(ops.attention, (q, k, v))
    assert torch.autograd.gradgradcheck(ops.attention, (q, k, v))


# Layouts.


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_strides_do_not_change_the_bits(dtype, view) -> None:
    memory = torch.randn(3 * 2 * 2 * 60 * 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = view(memory).unbind(0)
    plain = [value.contiguous().clone() for value in tensors]
    dout = upstream(plain[0])
    strided = dout.transpose(1, 2).contiguous().transpose(1, 2)
    found = differentiate(*tensors, strided)
    assert all(gradient.transpose(1, 2).is_contiguous() for gradient in found)
    assert all(map(torch.equal, found, differentiate(*plain, dout)))
    assert all(map(torch.equal, tensors, plain))


def test_of_a_gradient_that_is_one_number_repeated() -> None:
    """As that of a sum is."""
    q, k, v = (value.requires_grad_() for value in make((2, 2, 33, 77, 13, 13)))
    found = torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v))
    ones = torch.ones(2, 2, 33, 13)
    assert all(map(torch.equal, found, differentiate(q, k, v, ones)))


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.25) -> tuple:
    """The arguments of the backward."""
    out, statistics = torch.ops.fastdiff.attention_forward(q, k, v, scale)
    return upstream(out), q, k, v, out, statistics, scale


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_the_forward_has_the_bits_of_inference(dtype) -> None:
    q, k, v = make((2, 2, 70, 300, 13, 7), dtype)
    out, statistics = torch.ops.fastdiff.attention_forward(q, k, v, 0.25)
    assert torch.equal(out, ops.attention(q, k, v, 0.25))
    scores = q.double() @ k.double().mT * 0.25
    largest, total = statistics.double()
    found = largest * torch.tensor(2.0).double().log() + total.log()
    torch.testing.assert_close(found, scores.logsumexp(3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 2, 49, 259, 13, 7), (1, 1, 70, 600, 13, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_reads_and_leaves_no_other_memory(dtype, shape) -> None:
    """Inputs lie in the middle of NaNs, and fresh memory is full of them."""
    arguments = forward(*make(shape, dtype))
    wanted = torch.ops.fastdiff.attention_backward(*arguments)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(3).isnan().all())
        amid = *map(amid_nans, arguments[:-1]), arguments[-1]
        found = torch.ops.fastdiff.attention_backward(*amid)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, wanted))


# How it is called.


@pytest.mark.parametrize(
    "shape", [(3, 5, 70, 300, 16, 16), (1, 1, 500, 900, 16, 16), (1, 3, 90, 1300, 8, 8)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_threads_do_not_change_the_bits(dtype, shape) -> None:
    arguments, results = forward(*make(shape, dtype)), []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        results.append(torch.ops.fastdiff.attention_backward(*arguments))
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_calls_from_several_threads_at_once(dtype) -> None:
    calls = [forward(*make(shape, dtype)) for shape in [*SHAPES.values(), *LONG.values()]] * 2
    run = torch.ops.fastdiff.attention_backward
    wanted = [run(*arguments) for arguments in calls]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(lambda a: run(*a), calls), wanted, strict=True):
            assert all(map(torch.equal, found, right))


def test_is_one_call_forward_and_one_backward() -> None:
    q, k, v = (value.requires_grad_() for value in make((2, 2, 33, 77, 13, 13)))
    with CountCalls() as counted:
        y = ops.attention(q, k, v)
        y.backward(torch.ones_like(y))
    ours = [name for name in counted.names if name.startswith("fastdiff")]
    assert ours == ["fastdiff.attention_forward.default", "fastdiff.attention_backward.default"]


def test_only_what_is_wanted_gets_a_gradient() -> None:
    q, k, v = make((2, 2, 33, 77, 13, 13))
    wanted = differentiate(q, k, v, torch.ones(2, 2, 33, 13))
    for index in range(3):
        leaves = [value.clone().requires_grad_(i == index) for i, value in enumerate((q, k, v))]
        ops.attention(*leaves).sum().backward()
        for i, leaf in enumerate(leaves):
            assert leaf.grad is None if i != index else torch.equal(leaf.grad, wanted[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", ["odd", "one of everything", "wider values", "no images"])
def test_opcheck(shape, dtype) -> None:
    tensors = make(SHAPES[shape], dtype)
    leaves = [value.clone().requires_grad_() for value in tensors]
    torch.library.opcheck(torch.ops.fastdiff.attention_forward.default, (*leaves, 0.25))
    arguments = forward(*tensors)
    torch.library.opcheck(torch.ops.fastdiff.attention_backward.default, arguments)


def test_compiles_whole() -> None:
    q, k, v = (value.requires_grad_() for value in make((2, 2, 33, 77, 13, 13)))
    compiled = torch.compile(ops.attention, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    wanted = torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v))
    assert all(map(torch.equal, found, wanted))


@settings(max_examples=60)
@given(
    shape=st.tuples(
        st.integers(0, 2), st.integers(1, 3), st.integers(0, 90), st.integers(1, 300),
        st.integers(1, 70), st.integers(1, 70),
    ),
    dtype=st.sampled_from(DTYPES), scale=st.none() | st.floats(-2, 2, width=32),
)  # fmt: skip
def test_any_shape(shape, dtype, scale) -> None:
    judge(*make(shape, dtype), scale=scale)


# What is refused.


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (value.requires_grad_() for value in make((1, 1, 4, 5, 3, 3)))
    (dq,) = torch.autograd.grad(ops.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"attention_backward .* PyTorch's eager mode"):
        dq.sum().backward()


ARGUMENTS = forward(*make((2, 3, 4, 5, 6, 7)))
NAMES = ("dout", "q", "k", "v", "out", "statistics")
BROKEN = {
    "a gradient of another shape": ("dout", lambda t: t[..., :5]),
    "a gradient of another dtype": ("dout", lambda t: t.bfloat16()),
    "a gradient elsewhere": ("dout", lambda t: t.to("meta")),
    "a gradient of three dimensions": ("dout", lambda t: t[0]),
    "keys of another width": ("k", lambda t: t[..., :5]),
    "fewer values": ("v", lambda t: t[:, :, :4]),
    "q of float64": ("q", lambda t: t.double()),
    "q of three dimensions": ("q", lambda t: t[0]),
    "a result of other heads": ("out", lambda t: t[:, :2]),
    "a result of another dtype": ("out", lambda t: t.bfloat16()),
    "statistics of fewer queries": ("statistics", lambda t: t[..., :3]),
    "statistics of one row": ("statistics", lambda t: t[:1]),
    "statistics of float64": ("statistics", lambda t: t.double()),
}


@pytest.mark.parametrize(("name", "spoil"), BROKEN.values(), ids=BROKEN)
def test_the_kernel_checks_for_itself(name, spoil) -> None:
    arguments = list(ARGUMENTS)
    index = NAMES.index(name)
    arguments[index] = spoil(arguments[index])
    with pytest.raises((TypeError, ValueError)):
        torch.ops.fastdiff.attention_backward(*arguments)
