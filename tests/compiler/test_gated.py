"""Gated linear units in a graph: which become ``ops.geglu``, or part of the linear layer before."""

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


# -- in the epilogue of the linear layer, from 256 columns on


def wide(body: Body) -> nn.Module:
    return FeedForward(body, width=128).eval()


def scaled(y: Tensor) -> Tensor:
    a, b = (y * 0.5).chunk(2, dim=-1)
    return a * F.gelu(b)


def shifted(y: Tensor) -> Tensor:
    a, b = (y + y.mean()).chunk(2, dim=-1)
    return a * F.gelu(b)


def read_twice(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    return a * F.gelu(b) + y[..., :128].tanh()


def scaled_behind(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    return a * F.gelu(b) * 0.5


def added_behind(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    c = a * F.gelu(b)
    return c + c.flip(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("precision", ["fast", "strict"])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "body", [chunked, gate_first, scaled_behind, added_behind], ids=lambda body: body.__name__
)
@torch.no_grad()
def test_the_gate_is_part_of_the_linear_layer(body, dynamic, precision, dtype) -> None:
    model, options = wide(body).to(dtype), {"precision": precision}
    x = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    net = compiled(model, options=options, dynamic=dynamic)
    assert_as_eager(net(x), model, (x,), precision=precision)
    found = explain(model, x, options=options, dynamic=dynamic)
    assert found.composed == 0
    assert next(row.what for row in found.fused) == "linear + geglu"


@pytest.mark.parametrize("body", [scaled, shifted, read_twice], ids=lambda body: body.__name__)
@torch.no_grad()
def test_what_stands_between_keeps_them_apart(body) -> None:
    model, x = wide(body), torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1))
    assert_as_eager(compiled(model)(x), model, (x,))
    found = explain(model, x)
    assert found.composed == 1
    assert not any("geglu" in row.what for row in found.fused)


@torch.no_grad()
def test_a_norm_takes_the_statistics_of_what_is_gated_itself() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.wide, self.norm = nn.Linear(64, 256), nn.GroupNorm(8, 128)
            self.conv = nn.Conv1d(128, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.silu(self.norm(chunked(self.wide(x)).transpose(1, 2))))

    model, x = Normed().eval(), torch.randn(2, 10, 64)
    assert_as_eager(compiled(model)(x), model, (x,))
    assert any(row.what == "linear + geglu" for row in explain(model, x).fused)


@torch.no_grad()
def test_rows_of_a_matrix_are_gated_apart() -> None:
    model, x = wide(chunked), torch.randn(10, 8)
    assert_as_eager(compiled(model)(x), model, (x,))
    assert explain(model, x).composed == 1
