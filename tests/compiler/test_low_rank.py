"""LoRA's products are added to the weights that they adapt where that is right, and only there."""

from __future__ import annotations

import pytest
import torch
from judging import assert_as_eager, assert_changes_are_seen, compiled, distance, settled
from models import randomized
from torch import nn

from fastdiff.compiler import explain
from fastdiff.compiler.run import packing


class AdaptedLayer(nn.Module):
    """A layer with LoRA, as PEFT computes it."""

    def __init__(self, layer: nn.Module, ranks=(2,), scales=(0.5,), **changes) -> None:
        super().__init__()
        self.layer, self.scales = layer, list(scales)
        self.a, self.b = nn.ModuleList(), nn.ModuleList()
        for rank in ranks:
            if isinstance(layer, nn.Linear):
                self.a.append(nn.Linear(layer.in_features, rank, bias=False))
                self.b.append(nn.Linear(rank, layer.out_features, bias=False))
            else:
                window = {"kernel_size": layer.kernel_size, "stride": layer.stride,
                          "padding": layer.padding, **changes}  # fmt: skip
                self.a.append(nn.Conv2d(layer.in_channels, rank, bias=False, **window))
                self.b.append(nn.Conv2d(rank, layer.out_channels, 1, bias=False))

    def forward(self, x):
        result = self.layer(x)
        for scale, a, b in zip(self.scales, self.a, self.b, strict=True):
            result = result + b(a(x)) * scale
        return result


class AdaptedNet(nn.Module):
    """A residual block and an attention, of which the layers given are adapted."""

    def __init__(self, wrap=AdaptedLayer) -> None:
        super().__init__()
        self.conv_in = wrap(nn.Conv2d(3, 16, 3, padding=1))
        self.norm, self.down = nn.GroupNorm(4, 16), wrap(nn.Conv2d(16, 16, 3, 2, 1))
        self.q, self.k, self.v = (wrap(nn.Linear(16, 16, bias=False)) for _ in range(3))
        self.out, self.time = wrap(nn.Linear(16, 16)), wrap(nn.Linear(18, 16))
        self.conv_out = wrap(nn.Conv2d(16, 3, 1))

    def forward(self, x, emb):
        x = self.down(nn.functional.silu(self.norm(self.conv_in(x))))
        x = x + self.time(emb)[:, :, None, None]
        n, c, height, width = x.shape
        rows = x.flatten(2).transpose(1, 2)
        q, k, v = (part(rows).unflatten(2, (2, 8)).transpose(1, 2)
                   for part in (self.q, self.k, self.v))  # fmt: skip
        rows = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(rows).transpose(1, 2).reshape(n, c, height, width)
        return self.conv_out(x)


def net(wrap=AdaptedLayer):
    torch.manual_seed(0)
    return randomized(AdaptedNet(wrap)).eval()


def case(batch=2, size=(8, 12), dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(batch, 3, *size).to(dtype), torch.randn(batch, 18).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_as_eager(dtype):
    model = net().to(dtype)
    assert_as_eager(settled(compiled(model), case(dtype=dtype)), model, case(dtype=dtype))


def several(layer):
    return AdaptedLayer(layer, ranks=(1, 3, 2), scales=(0.5, -1.0, 2.0))


@pytest.mark.parametrize("wrap", [AdaptedLayer, several])
@torch.no_grad()
def test_no_layer_more_than_without_adapters(wrap):
    adapted, plain = explain(net(wrap), *case()), explain(net(lambda layer: layer), *case())
    assert [row.what for row in adapted.fused] == [row.what for row in plain.fused]
    assert adapted.left == plain.left
    assert adapted.packed_bytes == plain.packed_bytes


@torch.no_grad()
def test_several_adapters():
    model = net(several)
    assert_as_eager(settled(compiled(model), case()), model, case())


@torch.no_grad()
def test_changes_of_weights_are_seen():
    model = net()
    assert_changes_are_seen(compiled(model), model, case(), torch.float32)


@torch.no_grad()
def test_dynamic_sizes():
    model = net()
    forward = compiled(model, dynamic=True)
    for batch, size in ((2, (8, 12)), (3, (6, 10)), (2, (16, 4))):
        assert_as_eager(forward(*case(batch, size)), model, case(batch, size))


@torch.no_grad()
def test_under_autocast():
    model = net()
    forward = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = forward(*case()), model(*case())
    assert found.dtype == wanted.dtype
    assert distance(found, wanted.double()) < 0.03


@pytest.mark.parametrize("options", [{"precision": "strict"}, {"packed_bytes": 10**6}], ids=str)
@torch.no_grad()
def test_left_as_it_is(options):
    """Where weights may not be summed, or their memory is bounded."""
    model = net()
    found = settled(compiled(model, options=options), case())
    assert_as_eager(found, model, case(), precision=options.get("precision", "fast"))
    assert len(explain(model, *case(), options=options).fused) > len(explain(model, *case()).fused)


class Tapped(AdaptedLayer):
    """LoRA whose product is read a second time."""

    def forward(self, x):
        product = self.b[0](self.a[0](x))
        return self.layer(x) + product * self.scales[0] + 0.1 * product.tanh()


class Squared(AdaptedLayer):
    """LoRA of another tensor than the layer's input."""

    def forward(self, x):
        return self.layer(x) + self.b[0](self.a[0](x * x)) * self.scales[0]


class Biased(AdaptedLayer):
    """LoRA with a bias."""

    def __init__(self, layer):
        super().__init__(layer)
        self.a[0].bias = nn.Parameter(torch.ones(2))


class Scaled(AdaptedLayer):
    """LoRA with a scale for each row."""

    def forward(self, x):
        scale = x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        return self.layer(x) + self.b[0](self.a[0](x)) * scale


class Wider(AdaptedLayer):
    """LoRA of convolutions with another window."""

    def __init__(self, layer):
        linear = isinstance(layer, nn.Linear)
        super().__init__(layer, **({} if linear else {"kernel_size": 5, "padding": 2}))


@pytest.mark.parametrize("wrap", [Tapped, Squared, Biased, Scaled, Wider])
@torch.no_grad()
def test_what_only_looks_like_it(wrap):
    model = net(wrap)
    assert_as_eager(settled(compiled(model), case()), model, case())


@torch.no_grad()
def test_other_scales_take_the_memory_of_the_last():
    """The packed weights of an adapter that was rescaled are not kept."""
    model = net()
    forward = compiled(model)
    forward(*case())
    held = len(packing._packed)
    for scale in (0.25, 2.0, -1.0):
        for part in model.modules():
            if isinstance(part, AdaptedLayer):
                part.scales = [scale]
        torch.compiler.reset()  # a second scale would be an input of the next graph
        assert_as_eager(forward(*case()), model, case())
    assert len(packing._packed) == held


@torch.no_grad()
def test_scales_that_are_inputs():
    """From the second scale on it is no number in the graph, which serves all of them."""
    model = net()
    forward = compiled(model)
    for scale in (0.5, 0.25, 2.0, -1.0, 0.75):
        for part in model.modules():
            if isinstance(part, AdaptedLayer):
                part.scales = [scale]
        assert_as_eager(forward(*case()), model, case())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
