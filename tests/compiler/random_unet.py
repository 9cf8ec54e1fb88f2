"""U-Nets that nobody would build, to be drawn by hypothesis: every way of writing a residual
block, resampling, attention and skips that the compiler might see, and nodes it must leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from models import randomized
from torch import Tensor, nn

# For tests of drawn networks. Those that failed in an earlier run are not drawn again.
DRAWS = hypothesis.settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink],
)

EMB = 6  # channels of the embedding that blocks may add

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x, inplace=True),
    "swish": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "relu": F.relu,
    "none": lambda x: x,
}
EMBEDDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda emb: emb,
    "index": lambda emb: emb[:, :, None, None],
    "unsqueeze": lambda emb: emb.unsqueeze(-1).unsqueeze(-1),
    "view": lambda emb: emb.view(*emb.shape, 1, 1),
    "ellipsis": lambda emb: emb[..., None][..., None],
    "scale and shift": lambda emb: emb[:, :, None, None],
}


def swap_halves(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    a, b = x.split([half, x.shape[1] - half], dim=1)
    return torch.cat([b, a], dim=1)


def through_a_view(x: Tensor) -> Tensor:
    """Writes to x through another tensor."""
    rows = x.flatten(2) if x.is_contiguous() else x.permute(0, 2, 3, 1)
    rows.mul_(0.5)
    return x + 1


def normed_rows(x: Tensor) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    return F.layer_norm(rows, rows.shape[-1:]).transpose(1, 2).reshape(x.shape)


ODD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of the block's tensor and its input
    "tanh": lambda h, x: h.tanh(),
    "abs": lambda h, x: h.abs(),
    "swap halves": lambda h, x: swap_halves(h),
    "product": lambda h, x: h * (x if x.shape == h.shape else h),
    "relu in place": lambda h, x: h.relu_(),
    "add in place": lambda h, x: h.add_(0.5),
    "input written": lambda h, x: h * x.mul_(0.5).mean(),
    "plus input in place": lambda h, x: h.add_(x) if x.shape == h.shape else h.mul_(2),
    "view written": lambda h, x: through_a_view(h),
    "rows": lambda h, x: normed_rows(h),
    "plain view": lambda h, x: h.contiguous().view(-1).cos().view(h.shape),
    "permuted": lambda h, x: (h.permute(0, 2, 3, 1) * 2 - 1).permute(0, 3, 1, 2),
    "gate": lambda h, x: h * h.mean((2, 3), keepdim=True).sigmoid(),
    "flip": lambda h, x: h.flip(-1),
    "transposed": lambda h, x: h.transpose(2, 3).exp().clamp(max=3).transpose(2, 3),
    "where": lambda h, x: torch.where(h > 0, h, 0.1 * h),
    "in float64": lambda h, x: (h.double() * 3).to(h.dtype),
    "narrow": lambda h, x: h[:, : max(1, h.shape[1] - 1)],
    "three": lambda h, x: torch.cat([h, h, h.neg()], dim=1),
    "strided": lambda h, x: h[:, :, ::2].repeat_interleave(2, dim=2)[:, :, : h.shape[2]],
}


def divisor(channels: int, wanted: int) -> int:
    """The largest number of groups up to ``wanted`` that divides the channels."""
    return max(g for g in range(1, wanted + 1) if channels % g == 0)


@dataclass(frozen=True)
class Block:
    """A residual block of one or two convolutions.

    Attributes:
        order: of "norm", "act" and "conv".
        odd: what of ``ODD`` stands before, between or behind them, by position.
        factor: what the sum, or without residual the result, is multiplied or divided by.
        twice: the layers are applied a second time, with the same weights where shapes allow it.
    """

    out: int
    kernel: int
    order: tuple[str, ...]
    groups: int
    act: str = "silu"
    embedding: str = "none"
    residual: str = "none"
    factor: tuple[str, float] = ("mul", 1.0)
    odd: tuple[int, str] | None = None
    bias: bool = True
    kind: str = "plain"
    twice: bool = False


@dataclass(frozen=True)
class Net:
    """A U-Net: the way down, the middle and the way up.

    Attributes:
        down: a block and a kind of downsampling for each level.
        up: a block, a kind of upsampling and an order of the skip's concatenation for each.
        attention: kind of the middle's, or none.
        returns_parts: gives the middle's and the first skip's tensors besides.
    """

    stem: int
    down: tuple[tuple[Block, str], ...]
    middle: Block
    attention: str
    up: tuple[tuple[Block, str, str], ...]
    returns_parts: bool


class RandomBlock(nn.Module):
    def __init__(self, spec: Block, channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.norms, self.convs, self.projections = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = channels
        for turn in range(2 if spec.twice else 1):
            width = self.add_layers(width, first=turn == 0)
        self.out_channels = width
        self.shortcut: nn.Module | None = None
        if spec.residual != "none" and channels != width:
            kernel = 3 if spec.residual == "wide" else 1
            self.shortcut = nn.Conv2d(channels, width, kernel, padding=kernel // 2)

    def add_layers(self, width: int, first: bool) -> int:
        """One turn's modules for ``width`` channels; gives the channels behind them."""
        spec = self.spec
        for position, name in enumerate((*spec.order, "end")):
            if first and spec.odd is not None and spec.odd[0] == position:
                width = {"narrow": max(1, width - 1), "three": 3 * width}.get(spec.odd[1], width)
            if name == "norm":
                self.norms.append(nn.GroupNorm(divisor(width, spec.groups), width))
                if spec.embedding == "scale and shift":
                    self.projections.append(nn.Linear(EMB, 2 * width))
            elif name == "conv":
                last = self.convs[-1] if len(self.convs) else None
                tied = last is not None and last.in_channels == last.out_channels == width
                self.convs.append(last if tied else self.conv(width))
                width = self.convs[-1].out_channels
                if spec.embedding not in ("none", "scale and shift"):
                    self.projections.append(nn.Linear(EMB, width))
        return width

    def conv(self, channels: int) -> nn.Conv2d:
        spec = self.spec
        k, out, options = spec.kernel, spec.out, {"bias": spec.bias}
        if spec.kind == "depthwise":
            return nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels, **options)
        if spec.kind == "dilated":
            return nn.Conv2d(channels, out, k, padding=k // 2 * 2, dilation=2, **options)
        if spec.kind == "replicate":
            options["padding_mode"] = "replicate"
        return nn.Conv2d(channels, out, k, padding="same" if spec.kind == "same" else k // 2,
                         **options)  # fmt: skip

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        spec, h = self.spec, x
        norms, convs, projections = map(iter, (self.norms, self.convs, self.projections))
        for turn in range(2 if spec.twice else 1):
            for position, name in enumerate((*spec.order, "end")):
                if turn == 0 and spec.odd is not None and spec.odd[0] == position:
                    # the input is not to be written through h
                    h = ODD[spec.odd[1]](h.clone() if h is x and "view" in spec.odd[1] else h, x)
                if name == "norm":
                    h = next(norms)(h)
                    if spec.embedding == "scale and shift":
                        scale, shift = EMBEDDINGS["index"](next(projections)(emb)).chunk(2, dim=1)
                        h = h * (1 + scale) + shift
                elif name == "act":
                    # in place only what this block has made
                    act = "silu" if h is x and spec.act == "silu in place" else spec.act
                    h = ACTIVATIONS[act](h)
                elif name == "conv":
                    h = next(convs)(h)
                    if spec.embedding not in ("none", "scale and shift"):
                        h = h + EMBEDDINGS[spec.embedding](next(projections)(emb))
        if spec.residual != "none":
            x = x if self.shortcut is None else self.shortcut(x)
            h = x + h if spec.residual == "first" else h + x
        how, factor = spec.factor
        return h * factor if how == "mul" else h / factor


class Attention(nn.Module):
    """Over the pixels, one head: with linear layers on rows, or 1x1 convolutions on channels."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind, c = kind, channels
        self.norm = nn.GroupNorm(divisor(c, 4), c)
        if kind == "linear":
            self.q, self.k, self.v = (nn.Linear(c, c, bias=i > 0) for i in range(3))
            self.out: nn.Module = nn.Linear(c, c)
        else:
            layer = nn.Conv1d if kind == "conv1d" else nn.Conv2d
            self.qkv, self.out = layer(c, 3 * c, 1), layer(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if self.kind == "linear":
            rows = self.norm(x.reshape(n, c, h * w)).transpose(1, 2)
            q, k, v = (layer(rows)[:, None] for layer in (self.q, self.k, self.v))
            rows = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
            return rows.transpose(-1, -2).reshape(n, c, h, w) + x
        flat = x if self.kind == "conv2d" else x.reshape(n, c, -1)
        qkv = self.qkv(self.norm(flat)).reshape(n, 3 * c, h * w)
        q, k, v = qkv.chunk(3, dim=1)
        weight = (torch.einsum("bct,bcs->bts", q, k) / c**0.5).softmax(dim=-1)
        out = self.out(torch.einsum("bts,bcs->bct", weight, v).reshape(flat.shape))
        return (flat + out).reshape(x.shape)


class Down(nn.Module):
    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind, self.conv = kind, None
        if kind in ("stride", "asymmetric", "point"):
            kernel, padding = {"stride": (3, 1), "asymmetric": (3, 0), "point": (1, 0)}[kind]
            self.conv = nn.Conv2d(channels, channels, kernel, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2) if self.kind == "mean" else F.max_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.kind == "asymmetric" else x)


class Up(nn.Module):
    """To twice the size, or to that of the skip where this is odd."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv: nn.Module = nn.Identity()
        if kind in ("conv", "size"):
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        elif kind == "transposed":
            self.conv = nn.ConvTranspose2d(channels, channels, 2, stride=2)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        if self.kind == "transposed":
            return F.interpolate(self.conv(x), size=size)
        if self.kind == "bilinear":
            return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        doubled = (2 * x.shape[2], 2 * x.shape[3]) == tuple(size)
        if doubled and self.kind == "conv":
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class RandomUNet(nn.Module):
    def __init__(self, spec: Net) -> None:
        super().__init__()
        self.spec = spec
        self.stem = nn.Conv2d(3, spec.stem, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, widths = spec.stem, []
        for block, kind in spec.down:
            made = RandomBlock(block, width)
            width = made.out_channels
            widths.append(width)
            self.down.append(nn.ModuleList([made, Down(width, kind)]))
        self.middle = RandomBlock(spec.middle, width)
        width = self.middle.out_channels
        self.attention = nn.Identity()
        if spec.attention != "none":
            self.attention = Attention(width, spec.attention)
        for block, kind, _ in spec.up:
            up = Up(width, kind)
            made = RandomBlock(block, width + widths.pop())
            width = made.out_channels
            self.up.append(nn.ModuleList([up, made]))
        self.norm, self.out = nn.GroupNorm(1, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor | tuple[Tensor, ...]:
        x, skips = self.stem(x), []
        for block, down in self.down:
            x = block(x, emb)
            skips.append(x)
            x = down(x)
        first = skips[0]
        x = middle = self.attention(self.middle(x, emb))
        for (up, block), (_, _, order) in zip(self.up, self.spec.up, strict=True):
            skip = skips.pop()
            x = up(x, skip.shape[2:])
            x = block(torch.cat([x, skip] if order == "behind" else [skip, x], dim=1), emb)
        x = self.out(F.silu(self.norm(x)))
        return (x, middle, first) if self.spec.returns_parts else x


ORDERS = [("norm", "act", "conv"), ("norm", "conv"), ("act", "conv"), ("conv", "norm", "act"),
          ("conv",), ("norm", "act")]  # fmt: skip
blocks = st.builds(
    Block,
    out=st.sampled_from([1, 4, 7, 16, 17, 24, 32]),
    kernel=st.sampled_from([3, 3, 1, 5]),
    order=st.sampled_from([ORDERS[0], *ORDERS]),
    groups=st.sampled_from([1, 2, 4, 8, 32]),
    act=st.sampled_from(["silu", *ACTIVATIONS]),
    embedding=st.sampled_from(list(EMBEDDINGS)),
    residual=st.sampled_from(["none", "last", "first", "wide"]),
    factor=st.sampled_from([("mul", 1.0), ("div", 2**0.5), ("mul", 0.5), ("div", 1.0)]),
    odd=st.none() | st.tuples(st.integers(0, 3), st.sampled_from(list(ODD))),
    bias=st.booleans(),
    kind=st.sampled_from(["plain", "plain", "same", "replicate", "depthwise", "dilated"]),
    twice=st.booleans(),
)


@st.composite
def nets(draw: st.DrawFn) -> Net:
    """Of one or two levels."""
    levels = draw(st.integers(1, 2))
    downs = st.sampled_from(["stride", "asymmetric", "point", "mean", "max"])
    ups = st.sampled_from(["conv", "conv", "size", "nearest", "bilinear", "transposed"])
    order = st.sampled_from(["behind", "before"])
    return Net(
        stem=draw(st.sampled_from([4, 7, 16, 24])),
        down=tuple(draw(st.tuples(blocks, downs)) for _ in range(levels)),
        middle=draw(blocks),
        attention=draw(st.sampled_from(["none", "linear", "conv1d", "conv2d"])),
        up=tuple(draw(st.tuples(blocks, ups, order)) for _ in range(levels)),
        returns_parts=draw(st.booleans()),
    )


def build(spec: Net, seed: int = 0) -> RandomUNet:
    """In eval mode, its weights always the same."""
    return randomized(RandomUNet(spec), seed).eval()
