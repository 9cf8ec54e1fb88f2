"""group_norm_silu in eager mode against F.silu(F.group_norm(x)) of the same layout and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comparison import Comparison, every_dtype, every_layout, every_shape
from torch import Tensor

from fastdiff import ops

GROUPS = 32

activations = every_shape((8, 128, 32, 32), (16, 128, 32, 32), (4, 320, 64, 64))


def make(shape, dtype, layout) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    return x, torch.rand(shape[1]).to(dtype), torch.rand(shape[1]).to(dtype)


def peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def copies(passes: int, size: int):
    """Notes: GB/s of the least possible traffic, and its share of the GB/s of a copy."""

    def notes(comparison: Comparison) -> dict[str, str]:
        copy = comparison.peers.pop("copy")
        rate, of_copy = passes * size / comparison.ours, 2 * size / copy
        return {"GB/s": f"{rate / 1e9:.1f}", "of a copy's": f"{rate / of_copy:.0%}"}

    return notes


@every_layout
@every_dtype
@activations
def bench_forward(versus, shape, dtype, layout) -> None:
    arguments = x, weight, bias = make(shape, dtype, layout)
    out = torch.empty_like(x)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        torch.testing.assert_close(
            ops.group_norm_silu(x, GROUPS, weight, bias),
            peer(*arguments),
            atol=tolerance,
            rtol=0.02,
        )
        versus(
            lambda: ops.group_norm_silu(x, GROUPS, weight, bias),
            {"torch": lambda: peer(*arguments), "copy": lambda: out.copy_(x)},
            notes=copies(2, x.numel() * x.element_size()),
        )


@every_layout
@every_dtype
@activations
def bench_backward(versus, shape, dtype, layout) -> None:
    leaves = [value.requires_grad_() for value in make(shape, dtype, layout)]
    x, weight, bias = leaves
    ours, theirs = ops.group_norm_silu(x, GROUPS, weight, bias), peer(*leaves)
    grad = torch.randn(shape).to(dtype).contiguous(memory_format=layout)

    def backward(y: Tensor):
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    for a, b in zip(backward(ours)(), backward(theirs)(), strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    versus(
        backward(ours),
        {"torch": backward(theirs), "copy": lambda: torch.empty_like(grad).copy_(grad)},
        notes=copies(3, x.numel() * x.element_size()),
    )
