"""add_time_embedding: values, gradients, layouts and refusals."""

from __future__ import annotations

import pytest
import torch
from accuracy import DTYPE_IDS, DTYPES, LAYOUT_IDS, LAYOUTS, CountCalls, assert_as_accurate

from fastdiff import ops

SHAPES = {"odd": (3, 37, 5, 7), "one pixel": (2, 16, 1, 1), "wide": (1, 320, 4, 4)}


def make(shape, dtype, layout=torch.contiguous_format):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype)
    emb = torch.randn(shape[:2], generator=g).to(dtype)
    return x.contiguous(memory_format=layout).requires_grad_(), emb.requires_grad_()


def run(x, emb):
    y = ops.add_time_embedding(x, emb)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, emb))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, dtype, layout) -> None:
    assert_as_accurate(run, *make(shape, dtype, layout))


@pytest.mark.parametrize("dims", [0, 1, 3], ids=["no pixels", "1d", "3d"])
def test_other_numbers_of_dimensions(dims) -> None:
    assert_as_accurate(run, *make((2, 5, *range(3, 3 + dims)), torch.float32))


def test_strides_layouts_and_nothing() -> None:
    x, emb = make((2, 16, 6, 6), torch.float32, torch.channels_last)
    y = ops.add_time_embedding(x, emb)
    assert y.stride() == x.stride()
    part = x.detach()[:, ::2, 1:]
    row = emb.detach()[:1, ::2].expand(2, -1)
    assert torch.equal(ops.add_time_embedding(part, row), part + row[:, :, None, None])
    assert ops.add_time_embedding(x[:0], emb[:0]).shape == (0, 16, 6, 6)


def test_opcheck_compile_and_one_call() -> None:
    x, emb = make((2, 6, 3, 5), torch.float32, torch.channels_last)
    torch.library.opcheck(torch.ops.fastdiff.add_time_embedding.default, (x, emb))
    compiled = torch.compile(ops.add_time_embedding, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, emb), ops.add_time_embedding(x, emb))
    with torch.no_grad(), CountCalls() as counted:
        ops.add_time_embedding(x, emb)
    assert counted.names == ["fastdiff.add_time_embedding.default"]


X = torch.randn(2, 6, 4, 4)
REFUSED = {
    "channels": ((X, torch.ones(2, 5)), ValueError),
    "images": ((X, torch.ones(1, 6)), ValueError),
    "dtype": ((X, torch.ones(2, 6).half()), TypeError),
    "integers": ((X.long(), torch.ones(2, 6).long()), TypeError),
    "vector": ((X[0, :, 0, 0], torch.ones(6)), ValueError),
}


@pytest.mark.parametrize(("arguments", "error"), REFUSED.values(), ids=REFUSED)
def test_the_kernel_checks_for_itself(arguments, error) -> None:
    with pytest.raises(error):
        torch.ops.fastdiff.add_time_embedding.default(*arguments)
    with pytest.raises(error):
        ops.add_time_embedding(*arguments)
