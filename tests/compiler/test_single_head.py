"""Self-attention with one head: half its projections go, and nobody can tell from the values."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from judging import compiled, distance, graphs
from torch import Tensor, nn

from fastdiff.compiler import explain

PROJECTIONS = ("q", "k", "v", "out")
TAKEN = ["linear + residual + scale", "norm + linear", "single-head attention"]
LEFT = ["attention", "linear + residual + scale", "norm + 3 x linear"]


class Attention(nn.Module):
    """DDPM's attention over the pixels of a feature map, as diffusers computes it."""

    def __init__(
        self,
        channels: int = 24,
        width: int | None = None,
        *,
        heads: int = 1,
        bias: str = "qkvo",
        rescale: float = 1.5,
        residual: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        width = channels if width is None else width
        self.heads, self.rescale, self.residual = heads, rescale, residual
        self.norm = nn.GroupNorm(4, channels)
        self.q, self.k, self.v = (nn.Linear(channels, width, bias=n in bias) for n in "qkv")
        self.out = nn.Linear(width, channels, bias="o" in bias)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(noise / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.2 * noise)
                if name == "norm.weight":
                    p.add_(1)

    def rows(self, x: Tensor) -> Tensor:
        """The normalised pixels [B, L, C]."""
        n, c, height, width = x.shape
        return self.norm(x.view(n, c, height * width)).transpose(1, 2)

    def split(self, y: Tensor) -> Tensor:
        """Rows as heads [B, H, L, D]."""
        return y.view(y.shape[0], -1, self.heads, y.shape[2] // self.heads).transpose(1, 2)

    def attend(self, rows: Tensor) -> Tensor:
        """Rows to what the last projection reads."""
        q, k, v = (self.split(layer(rows)) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(len(y), -1, q.shape[3] * self.heads)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.attend(self.rows(x))).transpose(-1, -2).reshape(x.shape)
        return (y + x if self.residual else y) / self.rescale


class With(Attention):
    """One whose ``attend`` is a function of it and of its rows."""

    def __init__(self, body: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.body = body

    def attend(self, rows: Tensor) -> Tensor:
        return self.body(self, rows)


def image(channels: int = 24, batch: int = 2, size: tuple[int, int] = (6, 7)) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def names(model: nn.Module, x: Tensor, **options: Any) -> list[str]:
    found = explain(model, x, options=options)
    assert found.graphs == 1
    assert not found.reasons
    return sorted(row.what for row in found.fused)


@torch.no_grad()
def errors(model: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """Of both precisions and of eager mode, against float64."""
    oracle = copy.deepcopy(model).double()(x.double())
    found = []
    for precision in ("fast", "strict"):
        torch.compiler.reset()
        found.append(distance(compiled(model, options={"precision": precision})(x), oracle))
    return found[0], found[1], distance(model(x), oracle)


def assert_accurate(model: nn.Module, x: Tensor) -> None:
    """At most four times the error of all four projections, and eight units in the last place."""
    fast, strict, eager = errors(model, x)
    unit = 8 * torch.finfo(torch.float32).eps
    assert fast <= 4 * max(strict, eager) + unit, (fast, strict, eager)


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["qkvo", "", "q", "k", "v", "o", "qv", "vo", "kvo"])
@torch.no_grad()
def test_biases(bias: str) -> None:
    model, x = Attention(bias=bias), image()
    assert names(model, x) == TAKEN
    assert_accurate(model, x)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        (["linear", *TAKEN[1:]], {"residual": False, "rescale": 1.0}),
        (["linear + residual", *TAKEN[1:]], {"rescale": 1.0}),
        (["linear", *TAKEN[1:]], {"residual": False}),  # the scale is behind a view
        (TAKEN, {"width": 40}),
    ],
    ids=["bare", "residual", "rescale", "wider heads"],
)
@torch.no_grad()
def test_surroundings(what: list[str], options: dict[str, Any]) -> None:
    model, x = Attention(**options), image()
    assert names(model, x) == what
    assert_accurate(model, x)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("batch", "size"), [(1, (1, 1)), (1, (5, 5)), (1, (4, 6)), (3, (1, 9))])
@torch.no_grad()
def test_sizes(batch: int, size: tuple[int, int], layout: torch.memory_format) -> None:
    """(4, 6) has as many pixels as channels."""
    model = Attention()
    x = image(batch=batch, size=size).contiguous(memory_format=layout)
    assert names(model, x) == TAKEN
    assert_accurate(model, x)


def ill_conditioned(weight: Tensor, decades: float) -> Tensor:
    """A weight with singular values that spread over decades, as training leaves them."""
    u, s, vh = torch.linalg.svd(weight.double())
    values = torch.logspace(0, -decades, len(s), dtype=torch.float64)
    return ((u * values) @ vh * (s.norm() / values.norm())).float()


@pytest.mark.parametrize("grow", [1.0, 30.0], ids=["plain", "scores x30"])
@pytest.mark.parametrize("decades", [0.0, 4.0], ids=["random", "ill-conditioned"])
@torch.no_grad()
def test_accuracy(decades: float, grow: float) -> None:
    model, x = Attention(48), image(48, size=(9, 8))
    for layer in (model.q, model.k, model.v, model.out):
        if decades:
            layer.weight.copy_(ill_conditioned(layer.weight, decades))
    model.q.weight.mul_(grow)
    model.k.bias.mul_(grow)
    assert_accurate(model, x)


@torch.no_grad()
def test_a_large_mean() -> None:
    assert_accurate(Attention(), 30 + image())


# Where it is left alone.


@pytest.mark.parametrize("options", [{"precision": "strict"}, {"packed_bytes": 10**9}], ids=str)
@torch.no_grad()
def test_options_that_leave_it(options: dict[str, Any]) -> None:
    assert "single-head attention" not in names(Attention(), image(), **options)


@torch.no_grad()
def test_bfloat16_is_left() -> None:
    assert names(Attention().bfloat16(), image().bfloat16()) == LEFT


def cross(m: Attention, rows: Tensor) -> Tensor:
    q, k, v = m.split(m.q(rows)), m.split(m.k(rows * 2)), m.split(m.v(rows))
    return F.scaled_dot_product_attention(q, k, v)[:, 0]


def masked(m: Attention, rows: Tensor) -> Tensor:
    q, k, v = (m.split(layer(rows)) for layer in (m.q, m.k, m.v))
    mask = torch.ones(rows.shape[1], rows.shape[1]).tril().bool()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]


def normalised_queries(m: Attention, rows: Tensor) -> Tensor:
    q, k, v = (m.split(layer(rows)) for layer in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(F.normalize(q, dim=3), k, v)[:, 0]


def keys_are_queries(m: Attention, rows: Tensor) -> Tensor:
    q, v = m.q(rows), m.v(rows)
    return F.scaled_dot_product_attention(m.split(q), m.split(q), m.split(v))[:, 0]


def pixels_and_channels_swapped(m: Attention, rows: Tensor) -> Tensor:
    """The shapes are those of plain attention where there are as many pixels as channels."""
    q, k, v = (m.split(layer(rows)).transpose(2, 3) for layer in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v)[:, 0]


def keys_regrouped(m: Attention, rows: Tensor) -> Tensor:
    q, k, v = (layer(rows) for layer in (m.q, m.k, m.v))
    k = k.transpose(1, 2).reshape(q.shape)
    return F.scaled_dot_product_attention(m.split(q), m.split(k), m.split(v))[:, 0]


def result_swapped(m: Attention, rows: Tensor) -> Tensor:
    q, k, v = (m.split(layer(rows)) for layer in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)


def computed_weight(m: Attention, rows: Tensor) -> Tensor:
    q = F.linear(rows, m.q.weight * 2, m.q.bias)
    q, k, v = (m.split(y) for y in (q, m.k(rows), m.v(rows)))
    return F.scaled_dot_product_attention(q, k, v)[:, 0]


def computed_bias(m: Attention, rows: Tensor) -> Tensor:
    q = F.linear(rows, m.q.weight, m.q.bias * 2)
    q, k, v = (m.split(y) for y in (q, m.k(rows), m.v(rows)))
    return F.scaled_dot_product_attention(q, k, v)[:, 0]


LEFT_ALONE = [
    cross, masked, normalised_queries, keys_are_queries, pixels_and_channels_swapped,
    keys_regrouped, result_swapped, computed_weight, computed_bias,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("body", LEFT_ALONE, ids=lambda body: body.__name__)
@torch.no_grad()
def test_others_are_left(body: Callable[..., Tensor]) -> None:
    model, x = With(body), image(size=(4, 6))
    assert "single-head attention" not in names(model, x)
    assert_accurate(model, x)


@pytest.mark.parametrize("options", [{"heads": 2}, {"heads": 3}, {"width": 16}], ids=str)
@torch.no_grad()
def test_more_heads_and_narrow_ones_are_left(options: dict[str, Any]) -> None:
    model, x = Attention(**options), image()
    assert names(model, x) == LEFT
    assert_accurate(model, x)


class Kept(Attention):
    """Somebody else reads what lies between the projections too."""

    kept: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        layers = [layer(x) for layer in (self.q, self.k, self.v)]
        heads = [self.split(y) for y in layers]
        result = F.scaled_dot_product_attention(*heads)
        return self.out(result[:, 0]) + 2 * self.kept(layers, heads, result)


KEPT = {
    "queries": lambda layers, heads, result: layers[0],
    "values": lambda layers, heads, result: layers[2],
    "keys in heads": lambda layers, heads, result: heads[1][:, 0],
    "the result": lambda layers, heads, result: result.squeeze(1),
}


@pytest.mark.slow
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@torch.no_grad()
def test_what_others_read_is_left(kept: Callable[..., Tensor]) -> None:
    model, x = Kept(), image().flatten(2).transpose(1, 2).contiguous()
    model.kept = kept
    assert "single-head attention" not in names(model, x)
    assert_accurate(model, x)


# Other spellings.


def unsqueezed(m: Attention, rows: Tensor) -> Tensor:
    q, k, v = m.q(rows)[:, None], m.k(rows).unsqueeze(1), m.v(rows).unflatten(1, (1, -1))
    return F.scaled_dot_product_attention(q, k, v)[:, 0]


def scaled(m: Attention, rows: Tensor) -> Tensor:
    q, k, v = (m.split(layer(rows)) for layer in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v, scale=0.7).flatten(0, 1)


def shared(m: Attention, rows: Tensor) -> Tensor:
    """One layer called twice."""
    q, k, v = (m.split(layer(rows)) for layer in (m.q, m.q, m.v))
    return F.scaled_dot_product_attention(q, k, v)[:, 0]


@pytest.mark.parametrize("body", [unsqueezed, scaled, shared], ids=lambda body: body.__name__)
@torch.no_grad()
def test_spellings(body: Callable[..., Tensor]) -> None:
    model, x = With(body), image()
    assert names(model, x) == TAKEN
    assert_accurate(model, x)


class Rows(Attention):
    """On rows that no group norm gives, as a transformer block has them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(F.layer_norm(x, (x.shape[2],)))) + x


@torch.no_grad()
def test_rows_without_a_group_norm() -> None:
    model, x = Rows(), image().flatten(2).transpose(1, 2).contiguous()
    assert names(model, x) == ["linear", "linear + residual", "single-head attention"]
    assert_accurate(model, x)


class Between(nn.Module):
    """Attention between two convolutions, the second of them behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.norm = Attention(), nn.GroupNorm(4, 24)
        self.first, self.last = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.norm(self.attention(self.first(x)))))


@torch.no_grad()
def test_statistics_are_taken_where_somebody_reads_them() -> None:
    model, x = Between(), image(3)
    assert names(model, x) == [
        "conv 3x3", "linear + residual + scale + statistics", "norm + linear",
        "norm + silu + conv 3x3", "single-head attention",
    ]  # fmt: skip
    assert_accurate(model, x)


# Weights and sizes that change.


@pytest.mark.parametrize("way", ["in place", "data", "one row through data", "another tensor"])
@torch.no_grad()
def test_no_weight_is_stale(way: str) -> None:
    model, x = Attention(), image()
    net = compiled(model)
    for name, kind in itertools.product(PROJECTIONS, ("weight", "bias")):
        before = net(x)
        parameter = getattr(model, name).get_parameter(kind)
        if way == "in place":
            parameter.mul_(-1.5)
        elif way == "data":
            parameter.data.mul_(-1.5)
        elif way == "one row through data":
            parameter.data[3] *= -4
        else:
            setattr(getattr(model, name), kind, nn.Parameter(-1.5 * parameter))
        after, wanted = net(x), copy.deepcopy(model).double()(x.double())
        assert distance(after, wanted) < 4e-6, (name, kind)
        if (name, kind) != ("k", "bias"):  # softmax does not see it
            assert (after - before).abs().max() > 1e-3, (name, kind)
        assert torch.equal(net(x), after), (name, kind)


@torch.no_grad()
def test_weights_of_two_roles() -> None:
    """The same two tensors make up both products."""
    model, x = Attention(bias=""), image()
    model.out.weight, model.v.weight = model.q.weight, model.k.weight
    assert names(model, x) == TAKEN
    assert_accurate(model, x)


@torch.no_grad()
def test_any_batch_and_size_in_one_graph() -> None:
    model = Attention()
    net = compiled(model, dynamic=True)
    for batch, size in ((2, (6, 7)), (5, (6, 7)), (3, (4, 9)), (4, (8, 3))):
        x = image(batch=batch, size=size)
        oracle = copy.deepcopy(model).double()(x.double())
        assert distance(net(x), oracle) < 4e-6
    assert graphs() == 1
    torch.compiler.reset()
    found = explain(model, image(), dynamic=True)
    assert sorted(row.what for row in found.fused) == TAKEN


@torch.no_grad()
def test_what_is_derived_is_counted_once() -> None:
    model, x = Attention(), image()
    rows = {row.what: row.packed_bytes for row in explain(model, x).fused}
    copied = 4 * 24 * 24
    assert rows["norm + linear"] >= copied
    assert rows["linear + residual + scale"] >= copied
    assert rows["single-head attention"] == 0
