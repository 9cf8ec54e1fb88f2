"""conv_epilogue on CPU tensors, where PyTorch computes it: values, statistics and refusals."""

from __future__ import annotations

import pytest
import torch
from accuracy import DTYPE_IDS, DTYPES, LAYOUT_IDS, LAYOUTS, CountCalls, assert_as_accurate

from fastdiff import ops

SHAPES = {"image": (2, 6, 5, 7), "one pixel": (2, 13, 1, 1), "vector": (3, 5), "line": (2, 3, 10)}
GIVEN = {"bias": (1, 0, 0), "emb": (0, 1, 0), "residual": (0, 0, 1), "all": (1, 1, 1)}
epilogue = torch.ops.fastdiff.conv_epilogue.default


def make(shape, dtype, layout=torch.contiguous_format, given=(1, 1, 1)):
    """x, bias, emb and residual, or None for what is not given."""
    g = torch.Generator().manual_seed(0)
    layout = layout if len(shape) == 4 else torch.contiguous_format
    x, residual = (
        torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=layout) for _ in range(2)
    )
    bias, emb = (torch.randn(s, generator=g).to(dtype) for s in (shape[1:2], shape[:2]))
    others = zip((bias, emb, residual), given, strict=True)
    return x, *(value if wanted else None for value, wanted in others)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, dtype, layout, given) -> None:
    def run(x, *others):
        y, none = ops.conv_epilogue(x, *others)
        assert none is None
        leaves = [value for value in (x, *others) if value is not None]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    tensors = [v if v is None else v.requires_grad_() for v in make(shape, dtype, layout, given)]
    assert_as_accurate(run, *tensors)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("spans", [1, 3, 40])
def test_statistics_are_those_of_y(layout, spans) -> None:
    x, bias, emb, residual = make((2, 6, 5, 7), torch.bfloat16, layout)
    y, statistics = epilogue(x, bias, emb, residual, spans)
    assert (statistics.shape, statistics.dtype) == ((2, spans, 4, 6), torch.float32)
    values, length = y.double().flatten(2), -(-35 // spans)
    for span, (count, mean, remainder, deviation) in enumerate(
        statistics.double().unbind(2) for statistics in statistics.split(1, dim=1)
    ):
        part = values[..., span * length : (span + 1) * length]
        assert (count == part.shape[2]).all()
        if part.shape[2]:
            torch.testing.assert_close((mean + remainder)[:, 0], part.mean(2))
            wanted = part.var(2, correction=0) * part.shape[2]
            torch.testing.assert_close(deviation[:, 0], wanted, rtol=1e-6, atol=1e-12)
        else:
            assert not torch.cat((mean, remainder, deviation)).any()


def test_statistics_serve_the_next_norm() -> None:
    x, bias, emb, residual = make((2, 6, 5, 7), torch.float32)
    y, statistics = ops.conv_epilogue(x, bias, emb, residual, statistics=True)
    found = ops.group_norm_silu(y, 3, statistics=statistics)
    torch.testing.assert_close(found, ops.group_norm_silu(y, 3))


def test_the_result_is_memory_of_its_own() -> None:
    x = make((2, 3, 4, 5), torch.float32)[0]
    y, _ = ops.conv_epilogue(x)
    assert torch.equal(x, y)
    assert x.data_ptr() != y.data_ptr()


def test_opcheck_and_compile() -> None:
    arguments = make((2, 3, 4, 6), torch.float32, torch.channels_last)
    torch.library.opcheck(epilogue, (*(v.clone().requires_grad_() for v in arguments), 2))
    with CountCalls() as counted:
        ops.conv_epilogue(*arguments)
    assert counted.names == ["fastdiff.conv_epilogue.default"]
    compiled = torch.compile(ops.conv_epilogue, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        compiled(*arguments, statistics=True),
        ops.conv_epilogue(*arguments, statistics=True),
        strict=True,
    ):
        assert torch.equal(a, b)


X, BIAS, EMB = torch.ones(2, 3, 4, 5), torch.ones(3), torch.ones(2, 3)
REFUSED = {
    "a vector": ((BIAS, None, None, None, 0), ValueError, r"\[N, C, ...\]"),
    "integers": ((X.long(), None, None, None, 0), TypeError, "int64"),
    "bias of another length": ((X, BIAS[:2], None, None, 0), ValueError, "bias"),
    "bias of another dtype": ((X, BIAS.half(), None, None, 0), TypeError, "bias"),
    "emb of another batch": ((X, None, EMB[:1], None, 0), ValueError, "emb"),
    "residual of another shape": ((X, None, None, X[:1], 0), ValueError, "residual"),
    "spans below 0": ((X, None, None, None, -1), ValueError, "spans"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        epilogue(*arguments)
    if arguments[-1] == 0:
        with pytest.raises(error, match=message):
            ops.conv_epilogue(*arguments[:-1])
