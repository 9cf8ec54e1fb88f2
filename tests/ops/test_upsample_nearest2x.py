"""upsample_nearest2x on CPU tensors, where PyTorch computes it: values, gradients and refusals."""

from __future__ import annotations

import pytest
import torch
from accuracy import DTYPE_IDS, DTYPES, LAYOUT_IDS, LAYOUTS, CountCalls

from fastdiff import ops

SHAPES = {"even": (2, 4, 6, 8), "odd": (2, 5, 3, 7), "one pixel": (2, 13, 1, 1)}
namespace = torch.ops.fastdiff


def make(shape, dtype, layout):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_pixel_is_there_four_times(shape, dtype, layout) -> None:
    x = make(shape, dtype, layout)
    y = ops.upsample_nearest2x(x)
    assert torch.equal(y, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout) or shape[2:] == (1, 1)  # which is of both layouts


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_the_gradient_is_the_sum_of_four(layout) -> None:
    x = make((2, 3, 4, 5), torch.float64, layout).requires_grad_()
    grad = make((2, 3, 8, 10), torch.float64, layout)
    (found,) = torch.autograd.grad(ops.upsample_nearest2x(x), x, grad)
    wanted = grad.reshape(2, 3, 4, 2, 5, 2).sum((3, 5))
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_nothing(shape) -> None:
    n, c, h, w = shape
    x = torch.empty(shape, requires_grad=True)
    y = ops.upsample_nearest2x(x)
    assert y.shape == (n, c, 2 * h, 2 * w)
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_opcheck_and_compile() -> None:
    x = make((2, 3, 4, 6), torch.float32, torch.channels_last)
    torch.library.opcheck(namespace.upsample_nearest2x.default, (x.clone().requires_grad_(),))
    torch.library.opcheck(namespace.upsample_nearest2x_backward.default, (x,))
    with CountCalls() as counted:
        ops.upsample_nearest2x(x)
    assert counted.names == ["fastdiff.upsample_nearest2x.default"]
    compiled = torch.compile(ops.upsample_nearest2x, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.upsample_nearest2x(x))


@pytest.mark.parametrize(
    ("call", "x", "error", "message"),
    [
        (ops.upsample_nearest2x, torch.ones(2, 3, 4), ValueError, r"\(2, 3, 4\)"),
        (ops.upsample_nearest2x, torch.ones(1, 1, 2, 2).long(), TypeError, "int64"),
        (namespace.upsample_nearest2x, torch.ones(2, 3, 4), ValueError, r"\(2, 3, 4\)"),
        (namespace.upsample_nearest2x_backward, torch.ones(1, 1, 3, 4), ValueError, "2 H, 2 W"),
    ],
    ids=["three dimensions", "integers", "three dimensions, kernel", "odd gradient"],
)
def test_refusals(call, x, error, message) -> None:
    with pytest.raises(error, match=message):
        call(x)
