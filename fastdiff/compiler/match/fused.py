"""``Match``, a fused convolution, which begins as an anchor: a convolution or a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from fastdiff.compiler.graph.dtypes import parameter_of
from fastdiff.compiler.graph.nodes import argument, dtype_of, op, pair, value
from fastdiff.compiler.match.patterns import Norm
from fastdiff.ops.conv2d_algorithms import within_limits
from fastdiff.ops.conv2d_spec import ConvSpec


@dataclass(frozen=True)
class Activation:
    """A node, and which dimension of its value is the channels."""

    node: Node
    channel: int

    @property
    def form(self) -> tuple[int, int]:
        """The number of dimensions, and the channel dimension."""
        tensor = value(self.node)
        assert tensor is not None
        return tensor.ndim, self.channel


@dataclass
class Match:
    """One fused convolution. ``prologue`` and ``epilogue`` extend it node by node.

    Attributes:
        anchor: the convolution or linear layer.
        kind: ``conv2d``, ``conv1d`` or ``linear``.
        spec: what is computed, the prologue and the epilogue included.
        weight: the node of the parameter. The anchor may read a conversion of it to another dtype.
        x: its input.
        skip: a second input, concatenated behind the channels of x.
        norm: the norm of its prologue.
        factor: a constant that the weight is multiplied by.
        gain: a node [N or 1, C, 1, ...] that the input is multiplied by before its SiLU, where
            there is no norm.
        shares: constants that x and skip are multiplied by before the SiLU, where there is neither
            norm nor gain.
        end: the node that it computes.
        bias, emb, residual: nodes that it adds.
        scale: numbers and nodes that the sum is multiplied by (True) or divided by (False).
        absorbed: names of the fused operations besides the anchor, for the report.
    """

    anchor: Node
    kind: str
    spec: ConvSpec
    weight: Node
    bias: Node | None
    x: Activation
    end: Activation
    skip: Node | None = None
    norm: Norm | None = None
    factor: float = 1.0
    gain: Node | None = None
    shares: tuple[float, float] = (1.0, 1.0)
    emb: Node | None = None
    residual: Node | None = None
    scale: list[tuple[Any, bool]] = field(default_factory=list)
    absorbed: list[str] = field(default_factory=list)

    @property
    def is_scaled(self) -> bool:
        """Whether it has constants or gains, which only a call of its own can have."""
        return self.factor != 1 or self.gain is not None or self.shares != (1.0, 1.0)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all its inputs and results."""
        dtype = dtype_of(self.anchor)
        assert dtype is not None
        return dtype


def joined(matches: Sequence[Match]) -> ConvSpec:
    """The one convolution that computes all of ``matches``, which have the same input."""
    return replace(matches[0].spec, filters=sum(match.spec.filters for match in matches))


def anchor(node: Node, dtypes: Sequence[torch.dtype]) -> Match | None:
    """A match of this node alone; None where the node is no convolution that can be fused."""
    kind = op(node)
    if kind not in ("conv2d", "conv1d", "linear"):
        return None
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    images, result = value(x), value(node)
    parameter = parameter_of(weight)
    if images is None or result is None or parameter is None:
        return None
    tensors = [v for v in (x, weight, bias) if v is not None]
    if result.dtype not in dtypes or any(dtype_of(v) != result.dtype for v in tensors):
        return None
    if bias is not None and not isinstance(bias, Node):
        return None
    w = value(weight)
    assert w is not None
    if not all(isinstance(size, int) and size > 0 for size in w.shape):
        return None
    spec = _spec(node, w.shape, images.ndim) if w.layout == torch.strided else None
    if spec is None or not within_limits(spec):
        return None
    channel = images.ndim - 1 if kind == "linear" else 1
    start, end = Activation(x, channel), Activation(node, channel)
    return Match(node, kind, spec, parameter, bias, start, end)


def _spec(node: Node, shape: torch.Size, ndim: int) -> ConvSpec | None:
    """What an anchor with a weight of ``shape`` computes from an input of ``ndim`` dimensions."""
    if op(node) == "linear":
        return ConvSpec(*shape) if len(shape) == 2 and ndim in (2, 3, 4) else None
    if argument(node, "groups", 1) != 1 or ndim != len(shape):
        return None
    if pair(argument(node, "dilation", 1)) != (1, 1):
        return None
    stride = pair(argument(node, "stride", 1))
    if op(node) == "conv1d":
        padding = argument(node, "padding", 0)
        whole = stride == (1, 1) and shape[2] == 1
        plain = whole and (padding == "valid" or pair(padding) == (0, 0))
        return ConvSpec(*shape[:2]) if plain else None
    sides = _padding(node, shape)
    if stride is None or sides is None:
        return None
    return ConvSpec(shape[0], shape[1], (shape[2], shape[3]), stride, sides)


def _padding(node: Node, size: torch.Size) -> tuple[int, int, int, int] | None:
    """Zeros above, below, left and right; None for sizes that are no numbers."""
    padding = argument(node, "padding", 0)
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if pair(argument(node, "stride", 1)) != (1, 1):
            return None
        (top, left), (h, w) = ((size[2] - 1) // 2, (size[3] - 1) // 2), size[2:]
        return top, h - 1 - top, left, w - 1 - left
    both = pair(padding)
    return None if both is None else (both[0], both[0], both[1], both[1])
