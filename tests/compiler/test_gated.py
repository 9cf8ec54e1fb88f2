"""Gated linear units in a graph: which become ``ops.geglu``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from judging import assert_as_eager, compiled
from torch import Tensor, nn

from fastdiff.compiler import explain

Body = Callable[[Tensor], Tensor]


class FeedForward(nn.Module):
    """A transformer block's, gated by ``body``."""

    def __init__(self, body: Body, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow, self.body = nn.Linear(8, 2 * width), nn.Linear(width, 8), body

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.body(self.wide(x))) + x


def chunked(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    return a * F.gelu(b)


def gate_first(y: Tensor) -> Tensor:
    a, b = torch.chunk(y, 2, -1)
    return F.gelu(b, approximate="none").mul(a)


def split(y: Tensor) -> Tensor:
    a, b = y.split(12, dim=2)
    return F.gelu(input=b) * a


def approximate(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    return a * F.gelu(b, approximate="tanh")


def other_half(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    return b * F.gelu(a)


def of_itself(y: Tensor) -> Tensor:
    return y.chunk(2, dim=-1)[1] * F.gelu(y.chunk(2, dim=-1)[1])


def gate_kept(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    gate = F.gelu(b)
    return a * gate + gate


def three_parts(y: Tensor) -> Tensor:
    a, b, c = y.split([6, 12, 6], dim=-1)
    return b * F.gelu(torch.cat([a, c], dim=-1))


def along_pixels(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=1)
    return (a * F.gelu(b)).repeat(1, 2, 1)[..., :12]


def relu(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    return a * F.relu(b)


def sigmoid(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    return a * F.silu(b)


TAKEN, LEFT = (chunked, gate_first, split), (
    approximate, other_half, of_itself, gate_kept, three_parts, along_pixels, relu, sigmoid,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("body", [*TAKEN, *LEFT], ids=lambda body: body.__name__)
@torch.no_grad()
def test_values_and_what_is_taken(body: Body, dynamic: bool | None, dtype: torch.dtype) -> None:
    model = FeedForward(body).to(dtype).eval()
    x = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_as_eager(compiled(model, dynamic=dynamic)(x), model, (x,), precision="strict")
    torch.compiler.reset()
    found = explain(model, x, dynamic=dynamic)
    assert found.composed == (body in TAKEN)
    assert any("gelu" in name for name, _ in found.left) == (body not in (*TAKEN, relu, sigmoid))


@torch.no_grad()
def test_a_tensor_that_is_written_to_is_left() -> None:
    def body(y: Tensor) -> Tensor:
        a, b = y.chunk(2, dim=-1)
        a.mul_(2)
        return a * F.gelu(b)

    model, x = FeedForward(body).eval(), torch.randn(2, 10, 8)
    assert_as_eager(compiled(model)(x), model, (x,), precision="strict")
    torch.compiler.reset()
    assert explain(model, x).composed == 0
