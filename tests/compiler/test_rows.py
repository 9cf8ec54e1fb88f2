"""Linear layers of the same rows as one product, on the kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from judging import assert_as_eager, compiled, settled
from torch import Tensor, nn

import fastdiff
from fastdiff.compiler import explain
from fastdiff.compiler.choose import algorithms
from fastdiff.compiler.run import calls
from fastdiff.ops.conv2d_algorithms import within_limits
from fastdiff.ops.conv2d_spec import ConvSpec


class Projections(nn.Module):
    """The embedding as each block of a U-Net has it."""

    def __init__(self, biases: bool = True, outputs: tuple[int, ...] = (8, 40, 16)) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(24, k, bias=biases) for k in outputs)

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(F.silu(emb)) for layer in self.each)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biases", [True, False])
def test_few_and_many(biases: bool, dtype: torch.dtype) -> None:
    """One graph for all numbers of rows, of which few are read through the packed weight."""
    model = Projections(biases).to(dtype).eval()
    net = compiled(model, dynamic=True)
    for rows in (3, 2, calls.MOST_PRODUCT_ROWS, calls.MOST_PRODUCT_ROWS + 1, 3):
        case = (torch.randn(rows, 24).to(dtype),)
        assert_as_eager(settled(net, case), model, case, precision="strict")


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "algorithm"), [(calls.MOST_PRODUCT_ROWS, "direct"), (99, "plain")]
)
def test_what_is_told(rows: int, algorithm: str) -> None:
    (row,) = explain(Projections().eval(), torch.randn(rows, 24)).fused
    assert (row.what, row.algorithm) == ("silu + 3 x linear", algorithm)
    copied = 4 * 64 * 24  # which PyTorch reads; the kernel reads the packed form alone
    packed = algorithms.packed_bytes("direct", ConvSpec(64, 24))
    assert row.packed_bytes == (packed if algorithm == "direct" else copied)


@torch.no_grad()
def test_without_kernels() -> None:
    with fastdiff.backend("reference"):
        (row,) = explain(Projections().eval(), torch.randn(3, 24)).fused
    assert row.algorithm == "plain"


@torch.no_grad()
@pytest.mark.parametrize("spare", [0, -1])
def test_a_bound(spare: int) -> None:
    """The copy and its packed form fit, or nothing is fused: other rows may need both."""
    packed = algorithms.packed_bytes("direct", ConvSpec(64, 24))
    options = {"packed_bytes": 4 * 64 * 24 + packed + spare}
    found = explain(Projections().eval(), torch.randn(3, 24), options=options)
    assert found.packed_bytes == (packed if spare == 0 else 0)


@torch.no_grad()
def test_more_outputs_than_a_kernel_takes() -> None:
    outputs = (2**19, 2**19 + 1)
    assert within_limits(ConvSpec(max(outputs), 24))
    assert not within_limits(ConvSpec(sum(outputs), 24))
    model = Projections(outputs=outputs).eval()
    case = (torch.randn(2, 24),)
    assert_as_eager(settled(compiled(model), case), model, case)
    assert explain(model, *case).fused == ()
