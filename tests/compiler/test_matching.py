"""Each pattern on a small module: that it is fused, and that the values are those of eager mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdiff
from fastdiff.compiler import Explanation, explain
from fastdiff.compiler.pipeline import Options, compile_graph
from fastdiff.compiler.report import GraphReport

LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16)
Inputs = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _on_the_reference() -> Iterator[None]:
    """What is tested is the graph; the kernels have their own tests."""
    with fastdiff.backend("reference"):
        yield


def _randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.eval()


def _inputs(shapes: tuple[tuple[int, ...], ...]) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


@torch.no_grad()
def check(model: nn.Module, *shapes: tuple[int, ...], dynamic: bool | None = None) -> Explanation:
    """Compare with eager mode, each dtype in a layout; what was fused in float32."""
    _randomise(model)
    for dtype, layout in zip(DTYPES, LAYOUTS, strict=True):
        module = copy.deepcopy(model).to(dtype)
        oracle = copy.deepcopy(module).double()
        inputs = [
            x.to(dtype).to(memory_format=layout) if x.ndim == 4 else x.to(dtype)
            for x in _inputs(shapes)
        ]
        torch.compiler.reset()
        compiled = torch.compile(module, backend="fastdiff", fullgraph=True, dynamic=dynamic)
        given = [x.clone(memory_format=torch.preserve_format) for x in inputs]
        found = _outputs(compiled(*given))
        for before, after in zip(inputs, given, strict=True):
            assert torch.equal(before, after), "an input was written to"
        eager = _outputs(module(*[x.clone() for x in inputs]))
        exact = _outputs(oracle(*[x.double() for x in inputs]))
        for y, e, want in zip(found, eager, exact, strict=True):
            assert y.dtype == e.dtype
            assert y.shape == e.shape
            assert y.stride() == e.stride()
            atol = 1e-6 if dtype == torch.float32 else 1e-3
            scale = want.abs().max().clamp(min=1)
            assert (y - want).abs().max() <= 2 * (e - want).abs().max() + atol * scale
    torch.compiler.reset()
    return explain(model, *_inputs(shapes), dynamic=dynamic)


def names(found: Explanation) -> list[str]:
    assert found.graphs == 1
    assert not found.reasons
    return sorted(row.what for row in found.fused)


class Block(nn.Module):
    """Parts for the bodies below, which are functions of it and of the inputs."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.norm2 = nn.GroupNorm(4, 8), nn.GroupNorm(2, 8)
        self.wide_norm = nn.GroupNorm(3, 12)
        self.conv, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.wide, self.shortcut = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.point = nn.Conv2d(8, 8, 1)
        self.down = nn.Conv2d(8, 8, 3, stride=2)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.time, self.time2 = nn.Linear(5, 8), nn.Linear(5, 16)
        self.qkv = nn.Conv1d(8, 24, 1)
        self.act, self.in_place = nn.SiLU(), nn.SiLU(inplace=True)
        self.body = body

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(self, *inputs)


X, WIDE, TEMB = (2, 8, 6, 5), (2, 4, 6, 5), (2, 5)


@pytest.mark.parametrize(
    ("body", "shapes", "fused"),
    [
        pytest.param(lambda m, x: m.conv(m.act(m.norm(x))), [X], ["norm + silu + conv 3x3"],
                     id="norm-silu-conv"),
        pytest.param(lambda m, x: m.conv(m.norm(x)), [X], ["norm + conv 3x3"], id="norm-conv"),
        pytest.param(lambda m, x: m.conv(m.act(x)), [X], ["silu + conv 3x3"], id="silu-conv"),
        pytest.param(lambda m, x: m.conv(x * torch.sigmoid(x)), [X], ["silu + conv 3x3"],
                     id="swish"),
        pytest.param(lambda m, x: m.conv(F.dropout(m.in_place(m.norm(x)), 0.3, False)), [X],
                     ["norm + silu + conv 3x3"], id="in-place-silu-dropout"),
        pytest.param(lambda m, x: m.conv2(m.act(m.norm(m.conv(x)))), [X],
                     ["conv 3x3 + statistics", "norm + silu + conv 3x3"], id="statistics"),
        pytest.param(lambda m, x: m.conv(m.act(m.norm(x).float()).type(x.dtype)), [X],
                     ["norm + silu + conv 3x3"], id="casts"),
        pytest.param(lambda m, x: (x + m.conv(x)) / 1.0, [X], ["conv 3x3 + residual"],
                     id="residual"),
        pytest.param(lambda m, x: (m.conv(x) + x) / 2**0.5, [X], ["conv 3x3 + residual + scale"],
                     id="residual-scale"),
        pytest.param(lambda m, x: 0.5 * m.conv(x) * 3, [X], ["conv 3x3 + scale + scale"],
                     id="scales"),
        pytest.param(lambda m, x: m.conv(x).mul_(2).add_(x), [X], ["conv 3x3 + scale"],
                     id="nothing-after-scale"),
        pytest.param(lambda m, x, t: m.conv(x) + m.time(t)[:, :, None, None], [X, TEMB],
                     ["conv 3x3 + emb"], id="emb-index"),
        pytest.param(lambda m, x, t: m.conv(x) + m.time(t).unsqueeze(-1).unsqueeze(-1), [X, TEMB],
                     ["conv 3x3 + emb"], id="emb-unsqueeze"),
        pytest.param(lambda m, x, t: m.time(t).view(2, 8, 1, 1) + m.conv(x), [X, TEMB],
                     ["conv 3x3 + emb"], id="emb-view"),
        pytest.param(lambda m, x, t: m.conv(x) + m.time(t)[:1, :, None, None] + x, [X, TEMB],
                     ["conv 3x3 + emb + residual"], id="emb-of-one-image"),
        pytest.param(lambda m, x: m.down(F.pad(x, (0, 1, 0, 1))), [X], ["pad + conv 3x3"],
                     id="pad"),
        pytest.param(lambda m, x: m.conv(F.pad(m.norm(x), (1, 2))), [X], ["norm + pad + conv 3x3"],
                     id="norm-pad"),
        pytest.param(lambda m, x: m.conv(F.interpolate(x, scale_factor=2.0)), [X],
                     ["upsample + conv 3x3"], id="upsample"),
        pytest.param(lambda m, x: m.conv(F.interpolate(x, size=(12, 10))), [X],
                     ["upsample + conv 3x3"], id="upsample-to-size"),
        pytest.param(lambda m, x: m.conv(F.interpolate(m.act(m.norm(x)), scale_factor=2)), [X],
                     ["norm + silu + upsample + conv 3x3"], id="norm-silu-upsample"),
        pytest.param(lambda m, x, y: m.wide(m.act(m.wide_norm(torch.cat([x, y], 1)))), [X, WIDE],
                     ["cat + norm + silu + conv 3x3"], id="cat"),
        pytest.param(
            lambda m, x, y: (lambda h: m.wide(m.act(m.wide_norm(h))) + m.shortcut(h))(
                torch.cat((x, y), dim=-3)
            ),
            [X, WIDE], ["cat + conv 1x1", "cat + norm + silu + conv 3x3 + residual"],
            id="cat-shortcut"),
        pytest.param(lambda m, x: m.point(m.norm(x)), [X], ["norm + conv 1x1"], id="1x1"),
        pytest.param(lambda m, x: m.qkv(m.norm(x.reshape(2, 8, -1))), [X], ["norm + linear"],
                     id="conv1d"),
        pytest.param(
            lambda m, x, t: (lambda s: m.conv(m.act(m.norm(x) * (1 + s[:, :8]) + s[:, 8:])))(
                m.time2(t)[:, :, None, None]
            ),
            [X, TEMB], ["norm + silu + conv 3x3"], id="scale-shift"),
        pytest.param(lambda m, t: (m.time(m.act(t)), m.time2(m.act(t))), [TEMB],
                     ["silu + 2 x linear"], id="time-projections"),
    ],
)  # fmt: skip
def test_pattern(body: Callable[..., Any], shapes: Any, fused: list[str]) -> None:
    found = check(Block(body), *shapes)
    assert names(found) == sorted(fused)
    for kind in ("group_norm", "cat", "silu", "interpolate", "conv2d", "pad"):
        assert not any(name == kind for name, _ in found.left), str(found)


def attention(m: Block, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    y = x.view(b, c, h * w).transpose(1, 2)
    y = m.norm(y.transpose(1, 2)).transpose(1, 2)
    q, k, v = (f(y).view(b, -1, 2, c // 2).transpose(1, 2) for f in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, c)
    y = m.out(y.to(q.dtype)).transpose(-1, -2).reshape(b, c, h, w)
    return (y + x) / 1.5


@pytest.mark.parametrize("dynamic", [None, True])
def test_attention(dynamic: bool | None) -> None:
    found = check(Block(attention), X, dynamic=dynamic)
    assert names(found) == ["attention", "linear + residual + scale", "norm + 3 x linear"]


def test_attention_reads_the_statistics_of_a_convolution() -> None:
    found = check(Block(lambda m, x: m.conv2(m.norm2(attention(m, m.conv(x))))), X)
    assert names(found) == [
        "attention",
        "conv 3x3 + statistics", "linear + residual + scale + statistics", "norm + 3 x linear",
        "norm + conv 3x3",
    ]  # fmt: skip


def transformer(m: Block, x: Tensor) -> Tensor:
    """The spatial transformer of a conditional U-Net, in rows."""
    b, c, h, w = x.shape
    y = m.point(m.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, c)
    y = m.out(F.layer_norm(y, (c,))) + y
    a, gate = torch.cat([m.q(y), m.k(y)], dim=-1).chunk(2, dim=-1)
    y = m.v(a * F.gelu(gate)) + y
    return m.conv2(y.reshape(b, h, w, c).permute(0, 3, 1, 2).contiguous()) + x


def test_transformer() -> None:
    found = check(Block(transformer), X)
    assert names(found) == [
        "2 x linear", "conv 3x3 + residual", "linear + residual", "linear + residual",
        "norm + conv 1x1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "shapes", "left"),
    [
        pytest.param(lambda m, x: (h := m.act(m.norm(x)), m.conv(h)), [X], "group_norm_silu",
                     id="activation-returned"),
        pytest.param(lambda m, x: m.conv(m.act(m.norm(x)).tanh()), [X], "tanh", id="tanh-between"),
        pytest.param(lambda m, x, y: m.wide(torch.cat([y, y, y], 1)), [X, WIDE], "cat",
                     id="cat-of-three"),
        pytest.param(lambda m, x, y: m.wide(torch.cat([x, y], 1).tanh()), [X, WIDE], "cat",
                     id="cat-read-by-another"),
        pytest.param(lambda m, x: m.conv(F.interpolate(x, scale_factor=3)), [X], "interpolate",
                     id="three-times"),
        pytest.param(lambda m, x: m.conv(F.interpolate(x, scale_factor=2, mode="bilinear")), [X],
                     "interpolate", id="bilinear"),
        pytest.param(lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), value=0.5)), [X], "pad",
                     id="pad-with-value"),
        pytest.param(lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")), [X], "pad",
                     id="pad-reflects"),
        pytest.param(lambda m, x: F.conv2d(x, m.conv.weight[:, :4], groups=2), [X], "conv2d",
                     id="grouped"),
        pytest.param(lambda m, x: F.conv2d(x, m.conv.weight, dilation=2), [X], "conv2d",
                     id="dilated"),
        pytest.param(lambda m, x: F.conv2d(x, m.conv.weight * x.mean()), [X], "conv2d",
                     id="computed-weight"),
        pytest.param(lambda m, x: m.conv(x) + 1, [X], "add", id="a-number"),
        pytest.param(lambda m, x: m.conv(x) + x[:, :, :1, :], [X], "add", id="a-row"),
        pytest.param(lambda m, x: m.conv(x[:1]) + x, [X], "add", id="broadcast-images"),
        pytest.param(lambda m, x: (h := m.conv(x), h + x), [X], "add", id="result-returned"),
        pytest.param(lambda m, x: F.scaled_dot_product_attention(x, x, m.conv(x), is_causal=True),
                     [X], "scaled_dot_product_attention", id="causal"),
        pytest.param(lambda m, x: torch.add(m.conv(x), x, alpha=2), [X], "add", id="alpha"),
        pytest.param(lambda m, x: m.conv(x) * x, [X], "mul", id="product-of-images"),
    ],
)  # fmt: skip
def test_left_as_it_is(body: Callable[..., Any], shapes: Any, left: str) -> None:
    if left == "group_norm_silu":
        found = check(Block(body), *shapes)
        assert found.composed == 1
    else:
        found = check(Block(body), *shapes)
        assert any(name == left for name, _ in found.left), str(found)


def twice(m: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.conv(x)
    view = h.flatten(2)
    h.add_(1)
    return m.conv2(h), view


def slices(m: Block, x: Tensor) -> Tensor:
    h = m.conv(x)
    h[:, :2] = 0
    return m.conv2(m.act(m.norm(h)))


def shifted(m: Block, x: Tensor) -> Tensor:
    h = m.conv(x)
    y = m.norm(h)
    h += x
    h *= 0.5
    return m.conv2(m.in_place(y)) + h


def read_before(m: Block, x: Tensor) -> Tensor:
    h = m.conv(x)
    y = m.conv2(m.act(h))
    F.relu(h, inplace=True)
    return y + h


@pytest.mark.parametrize("body", [twice, slices, shifted, read_before])
@pytest.mark.parametrize("dynamic", [None, True])
def test_writes_in_place(body: Callable[..., Any], dynamic: bool | None) -> None:
    check(Block(body), X, dynamic=dynamic)


@torch.no_grad()
def test_writes_to_its_input() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        y = m.conv(x)
        x.mul_(2)
        return y + m.conv2(m.act(x))

    model = _randomise(Block(body))
    x, y = _inputs((X, X))
    y.copy_(x)
    found = torch.compile(model, backend="fastdiff", fullgraph=True)(x)
    torch.testing.assert_close(found, model(y))
    assert torch.equal(x, y)


def test_layouts_of_intermediates() -> None:
    def body(m: Block, x: Tensor) -> tuple[Tensor, ...]:
        h = m.conv(x)
        a, b = m.conv2(h).chunk(2, dim=1)
        return h.view(2, 4, 2, -1), h.mT, a, h[:, :, ::2], h.as_strided((4, 3), (3, 1)), b.relu()

    check(Block(body), X)


def test_one_pixel_and_one_image() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        return m.conv2(m.act(m.norm(m.conv(x)))) + x

    check(Block(body), (1, 8, 1, 3))


@torch.no_grad()
def test_new_sizes_need_no_new_graph() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        h = attention(m, m.conv(m.act(m.norm(x))))
        return m.conv2(F.interpolate(h, scale_factor=2.0))

    model = _randomise(Block(body))
    compiled = torch.compile(model, backend="fastdiff", fullgraph=True, dynamic=True)
    for n, h, w in ((2, 6, 5), (3, 6, 5), (4, 8, 9), (5, 3, 7)):
        (x,) = _inputs(((n, 8, h, w),))
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_two_models_of_one_class() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        return m.conv(m.act(m.norm(x)))

    first, second = _randomise(Block(body)), Block(body).eval()
    (x,) = _inputs((X,))
    compiled = [torch.compile(m, backend="fastdiff", fullgraph=True) for m in (first, second)]
    for _ in range(2):
        for model, fused in zip((first, second), compiled, strict=True):
            torch.testing.assert_close(fused(x), model(x), atol=1e-5, rtol=1e-5)


def _dynamo_graph(model: nn.Module, *inputs: Tensor) -> tuple[torch.fx.GraphModule, list[Any]]:
    graphs: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((gm, example_inputs))
        return gm.forward

    torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    return graphs[0]


def test_gpu_graph() -> None:
    """The rewrite for CUDA tensors, on CPU tensors, with the identity in Inductor's place."""
    from fastdiff.compiler.rewrite import composed

    def body(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([x, y], dim=1)
        h = m.wide(m.act(m.wide_norm(both))) + m.time(t)[:, :, None, None]
        h = m.conv(m.act(m.norm(h))) + m.shortcut(both)
        return m.conv2(F.interpolate(h, scale_factor=2.0, mode="nearest"))

    model = _randomise(Block(body))
    inputs = _inputs((X, WIDE, TEMB))
    gm, example = _dynamo_graph(model, *inputs)
    from fastdiff.compiler.graph.canonical import mark_parameters

    mark_parameters(gm, example)
    assert composed.gpu(gm) == 5
    gm.recompile()
    called = [node.target for node in gm.graph.nodes]
    assert called.count(fastdiff.ops.group_norm_silu) == 2
    assert called.count(fastdiff.ops.conv_epilogue) == 2
    assert called.count(fastdiff.ops.upsample_nearest2x) == 1
    assert F.silu not in called
    norms = [n for n in gm.graph.nodes if n.target is fastdiff.ops.group_norm_silu]
    assert [set(n.kwargs) for n in norms] == [{"skip"}, {"statistics"}]
    (found,) = gm.forward(*example)
    torch.testing.assert_close(found, model(*inputs), atol=1e-5, rtol=1e-5)


def test_gradients() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        return m.conv2(m.in_place(m.norm(m.conv(x)))) + x

    model = _randomise(Block(body))
    (x,) = _inputs((X,))
    compiled = torch.compile(model, backend="fastdiff", fullgraph=True)
    compiled(x).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-4, rtol=1e-4)
    seen = explain(model, x)
    assert seen.gradients
    assert not seen.reasons
    assert "gradients" in str(seen)


def test_cuda_graphs_go_to_inductor() -> None:
    """Control flow alone, on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 8, 4, 4, device="cuda")
        graph = torch.fx.Graph()
        node = graph.placeholder("x")
        node.meta["example_value"] = x
        h = graph.call_function(F.silu, (node,))
        h.meta["example_value"] = x
        graph.output((h,))
    given: list[Any] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        given.append(gm)
        return gm.forward

    found = GraphReport()
    compile_graph(torch.fx.GraphModule({}, graph), [x], Options(), found, inner)
    assert len(given) == 1
    assert "cuda" in str(found.reason)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)), torch.ones(1, 3, 8, 8), "training"),
        (nn.Conv2d(3, 4, 3).double(), torch.ones(1, 3, 8, 8).double(), "float64"),
        (nn.Conv2d(3, 4, 3), torch.ones(0, 3, 8, 8), "empty"),
    ],
    ids=["training", "dtype", "empty"],
)
def test_why_not(model: nn.Module, x: Tensor, reason: str) -> None:
    found = explain(model, x)
    assert not found.fused
    assert reason in found.reasons[0]
