"""attention: values, hard scores, layouts, and what it must refuse or let through."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from accuracy import CountCalls, amid_nans, assert_as_accurate
from attention_cases import BAD, DTYPE_IDS, DTYPES, SCORES, SHAPES, TAILS, VIEWS, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops.backend import isa

pytestmark = pytest.mark.usefixtures("one_thread")


def judge(q, k, v, scale=None, cancelling=False) -> None:
    """Hold to what rounding explains: a value is the sum of as many terms as there are keys."""

    def run(*tensors: Tensor):
        return [ops.attention(*tensors, scale)]

    assert_as_accurate(run, q, k, v, cancelling=cancelling, terms=k.shape[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values(shape, dtype) -> None:
    judge(*make(shape, dtype))


@pytest.mark.parametrize("shape", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_tails(dtype, shape) -> None:
    for n in range(1, 34):
        judge(*make(shape(n), dtype), cancelling=True)


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 100, 300, 40, 40), (2, 1, 64, 77, 80, 80), (1, 1, 9, 999, 8, 5), (1, 2, 50, 1, 64, 64)],
    ids=str,
)
@pytest.mark.parametrize("factor", [0.1, 1, 10], ids=str)
def test_errs_at_most_twice_as_much_as_pytorch_in_bfloat16(shape, factor) -> None:
    """In the root mean square of all values, where single ones would be a matter of luck."""
    q, k, v = make(shape, torch.bfloat16)
    q = q * factor
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    theirs = (F.scaled_dot_product_attention(q, k, v).double() - exact).norm()
    assert (ops.attention(q, k, v).double() - exact).norm() <= 2 * theirs


@pytest.mark.skipif(isa() not in ("AVX512_BF16", "AMX"), reason="multiplies float32")
def test_numerators_are_rounded_to_bfloat16_and_their_sum_is_not() -> None:
    """So the products are of bfloat16. Two values that all but cancel show the rounding."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0, -0.015625]).view(1, 1, 2, 1)
    v = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
    second = torch.tensor(-0.015625, dtype=torch.float64).exp()  # 0.9845, rounded to 0.9844
    wanted = (1 - second.bfloat16().double()) / (1 + second)
    exact = (1 - second) / (1 + second)
    assert abs(exact - wanted) > 0.005 * exact
    found = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 1.0).double().item()
    assert found == wanted.bfloat16().item() != exact.bfloat16().item()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_what_pytorch_calls_attention(shape) -> None:
    q, k, v = make(shape)
    wanted = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ops.attention(q, k, v), wanted, rtol=1e-5, atol=2e-6)


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


def test_values_of_any_mean() -> None:
    q, k, v = make((1, 2, 50, 600, 16, 16))
    judge(q, k, v + 1000)


@pytest.mark.parametrize(("which", "where", "bad"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_what_is_not_finite(dtype, which, where, bad) -> None:
    """Shows where it shows in PyTorch's softmax(q k^T) v."""
    tensors = [value.abs().to(dtype) for value in make((1, 2, 50, 600, 8, 5))]
    tensors[which][where] = bad
    y = ops.attention(*tensors, 0.5)
    q, k, v = (value.double() for value in tensors)
    scores = (q.float() @ k.float().mT * 0.5).double()
    wanted = scores.softmax(3) @ v
    torch.testing.assert_close(
        y.double(), wanted, rtol=0.02, atol=0.01, equal_nan=True, check_dtype=False
    )


# Layouts.


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_strides_do_not_change_the_bits(dtype, view) -> None:
    memory = torch.randn(3 * 2 * 2 * 60 * 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = view(memory).unbind(0)
    plain = [value.contiguous().clone() for value in tensors]
    y = ops.attention(*tensors)
    assert y.transpose(1, 2).is_contiguous()
    assert torch.equal(y, ops.attention(*plain))
    assert all(map(torch.equal, tensors, plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_reads_nothing_beside_its_inputs(dtype) -> None:
    """Inputs lie in the middle of NaNs."""
    tensors = make((2, 2, 49, 259, 13, 7), dtype)
    assert torch.equal(ops.attention(*map(amid_nans, tensors)), ops.attention(*tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["f64", "f16"])
def test_other_dtypes_are_computed_by_the_reference(dtype) -> None:
    tensors = make(SHAPES["odd"], dtype)
    with CountCalls() as counted:
        y = ops.attention(*tensors)
    assert not any(name.startswith("fastdiff") for name in counted.names)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.scaled_dot_product_attention(*tensors), rtol=2e-3, atol=2e-3)


def test_is_one_dispatcher_call() -> None:
    tensors = make(SHAPES["odd"])
    with CountCalls() as counted:
        ops.attention(*tensors)
    assert counted.names == ["fastdiff.attention.default"]


@pytest.mark.parametrize("shape", [(1, 1, 500, 300, 16, 16), (3, 5, 7, 300, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_threads_do_not_change_the_bits(dtype, shape) -> None:
    tensors, results = make(shape, dtype), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(ops.attention(*tensors))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_calls_from_several_threads_at_once(dtype) -> None:
    calls = [make(shape, dtype, seed) for seed, shape in enumerate(SHAPES.values())] * 3
    wanted = [ops.attention(*tensors) for tensors in calls]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda tensors: ops.attention(*tensors), calls)
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", ["odd", "one of everything", "wider values"])
def test_opcheck(shape, dtype) -> None:
    torch.library.opcheck(torch.ops.fastdiff.attention.default, (*make(SHAPES[shape], dtype), 0.25))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fakes_have_the_strides_of_the_kernel(shape) -> None:
    tensors = make(shape)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.attention(*map(mode.from_tensor, tensors))
    real = ops.attention(*tensors)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@settings(max_examples=60)
@given(
    shape=st.tuples(
        st.integers(0, 2), st.integers(1, 3), st.integers(0, 60), st.integers(1, 300),
        st.integers(1, 40), st.integers(1, 40),
    ),
    dtype=st.sampled_from(DTYPES), scale=st.none() | st.floats(-2, 2, width=32),
)  # fmt: skip
def test_any_shape(shape, dtype, scale) -> None:
    judge(*make(shape, dtype), scale=scale, cancelling=True)


# Bad input.

Q, K, V = make((2, 3, 4, 5, 6, 7))
REFUSED = [
    ("integers", lambda: ops.attention(Q.long(), K.long(), V.long()), TypeError,
     "q must be floating point, got torch.int64"),
    ("a sparse tensor", lambda: ops.attention(Q.to_sparse(), K, V), TypeError, "dense tensor"),
    ("sparse values", lambda: ops.attention(Q, K, V.to_sparse()), TypeError,
     "v must be a dense tensor"),
    ("no heads", lambda: ops.attention(Q[:, 0], K[:, 0], V[:, 0]), ValueError,
     r"\[B, H, L, D\], got \(2, 4, 6\), \(2, 5, 6\) and \(2, 5, 7\)"),
    ("keys of another width", lambda: ops.attention(Q, K[..., :5], V), ValueError,
     r"k must have shape \(2, 3, 5, 6\), got \(2, 3, 5, 5\)"),
    ("keys of other heads", lambda: ops.attention(Q, K[:, :1], V), ValueError, "k must have shape"),
    ("keys of another batch", lambda: ops.attention(Q, K[:1], V), ValueError, "k must have shape"),
    ("fewer values", lambda: ops.attention(Q, K, V[:, :, :4]), ValueError,
     r"v must have shape \(2, 3, 5, 7\), got \(2, 3, 4, 7\)"),
    ("keys of another dtype", lambda: ops.attention(Q, K.bfloat16(), V), TypeError,
     "k must have the dtype of q, torch.float32, got torch.bfloat16"),
    ("values of another dtype", lambda: ops.attention(Q, K, V.double()), TypeError,
     "v must have the dtype of q"),
    ("values elsewhere", lambda: ops.attention(Q, K, V.to("meta")), ValueError,
     "v must be on the device of q, cpu, got meta"),
    ("no keys", lambda: ops.attention(Q, K[:, :, :0], V[:, :, :0]), ValueError,
     r"at least one key, got k of shape \(2, 3, 0, 6\)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "error", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED]
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(backend, bad, error, message) -> None:
    with fastdiff.backend(backend), pytest.raises(error, match=message):
        bad()


STRAIGHT = {
    "float64": lambda op: op(Q.double(), K.double(), V.double(), 1.0),
    "integers": lambda op: op(Q.long(), K.long(), V.long(), 1.0),
    "three dimensions": lambda op: op(Q[0], K[0], V[0], 1.0),
    "q of three dimensions": lambda op: op(Q[0], K, V, 1.0),
    "k of three dimensions": lambda op: op(Q, K[0], V, 1.0),
    "v of five dimensions": lambda op: op(Q, K, V[None], 1.0),
    "keys of another width": lambda op: op(Q, K[..., :5], V, 1.0),
    "keys of another batch": lambda op: op(Q, K[:1], V, 1.0),
    "values of other heads": lambda op: op(Q, K, V[:, :1], 1.0),
    "more values": lambda op: op(Q, K[:, :, :4], V, 1.0),
    "keys of another dtype": lambda op: op(Q, K.bfloat16(), V, 1.0),
    "values of another dtype": lambda op: op(Q, K, V.half(), 1.0),
    "values elsewhere": lambda op: op(Q, K, V.to("meta"), 1.0),
    "no keys": lambda op: op(Q, K[:, :, :0], V[:, :, :0], 1.0),
}


@pytest.mark.parametrize("bad", STRAIGHT.values(), ids=STRAIGHT)
def test_the_kernel_checks_for_itself(bad) -> None:
    with pytest.raises((TypeError, ValueError)):
        bad(torch.ops.fastdiff.attention)


# Keys whose packed size does not fit 64 bits or any memory, though they are one number repeated: a
# crash would take the test run with it, so a process of their own computes them.
SCRIPT = """
import torch
from fastdiff import ops
one = torch.zeros(1, 1, 1, 1, dtype=torch.{dtype})
for keys in (2**50, -(-(2**64) // 130) - 64, 2**63 - 65, 2**63 - 1):
    many = one.expand(1, 1, keys, 1)
    try:
        print(keys, ops.attention(one, many, many), flush=True)
    except (MemoryError, RuntimeError, ValueError):
        print("refused", flush=True)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_huge_sizes_are_refused(dtype) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(dtype=dtype)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["refused"] * 4, done.stderr
    assert done.returncode == 0
