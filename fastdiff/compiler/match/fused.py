"""A fused convolution, and where it begins: at a convolution or a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fastdiff.compiler.graph.nodes import argument, dtype_of, is_weight, op, pair, value
from fastdiff.compiler.match.patterns import Norm
from fastdiff.ops.conv2d import MOST_CHANNELS, within_limits


@dataclass(frozen=True)
class Activation:
    """A node with the dimension that its channels are."""

    node: Node
    channel: int

    @property
    def form(self) -> tuple[int, int]:
        """Number of dimensions, and the one of the channels."""
        found = value(self.node)
        assert found is not None
        return found.ndim, self.channel


@dataclass
class Match:
    """One fused convolution.

    Attributes:
        anchor: the convolution or linear layer.
        kind: ``conv2d``, ``conv1d`` or ``linear``.
        kernel: height and width.
        x: what it reads first.
        skip: what it reads behind x's channels.
        end: the node whose value it gives.
        bias, emb, residual: nodes that it adds.
        scale: numbers and nodes that the sum is multiplied by (True) or divided by (False).
        statistics: somebody wants those of the result.
        gated: its result is a * gelu(b), [a, b] being what it computes.
        absorbed: nodes that it stands for, for the report.
    """

    anchor: Node
    kind: str
    kernel: tuple[int, int]
    weight: Node
    bias: Node | None
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    x: Activation
    end: Activation
    skip: Node | None = None
    norm: Norm | None = None
    silu: bool = False
    upsample: bool = False
    emb: Node | None = None
    residual: Node | None = None
    scale: list[tuple[Any, bool]] = field(default_factory=list)
    statistics: bool = False
    gated: bool = False
    absorbed: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """That of all that it reads and writes."""
        found = dtype_of(self.anchor)
        assert found is not None
        return found

    @property
    def filters(self) -> int:
        """The weight's output channels."""
        found = value(self.weight)
        assert found is not None
        return int(found.shape[0])

    @property
    def pointwise(self) -> bool:
        """Whether each pixel is computed from itself alone."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding)


def anchor(node: Node, dtypes: Sequence[torch.dtype]) -> Match | None:
    """A node as a convolution with nothing around it yet; None if it is none that is fused."""
    kind = op(node)
    if kind not in ("conv2d", "conv1d", "linear"):
        return None
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    shape, found = value(x), value(node)
    if shape is None or found is None or not is_weight(weight):
        return None
    tensors = [v for v in (x, weight, bias) if v is not None]
    if found.dtype not in dtypes or any(dtype_of(v) != found.dtype for v in tensors):
        return None
    if bias is not None and not isinstance(bias, Node):
        return None
    w = value(weight)
    assert w is not None
    if not all(isinstance(size, int) for size in w.shape) or w.layout != torch.strided:
        return None
    if max(w.shape[:2]) > MOST_CHANNELS:
        return None
    if kind == "linear":
        if w.ndim != 2 or shape.ndim not in (2, 3, 4):
            return None
        stride, padding, kernel = (1, 1), (0, 0, 0, 0), (1, 1)
        return Match(node, kind, kernel, weight, bias, stride, padding,
                     Activation(x, shape.ndim - 1), Activation(node, shape.ndim - 1))  # fmt: skip
    if argument(node, "groups", 1) != 1 or shape.ndim != w.ndim:
        return None
    dilation = argument(node, "dilation", 1)
    if pair(dilation) != (1, 1):
        return None
    if kind == "conv1d":
        padding = argument(node, "padding", 0)
        whole = pair(argument(node, "stride", 1)) == (1, 1) and w.shape[2] == 1
        if not whole or not (padding == "valid" or pair(padding) == (0, 0)):
            return None
        size = (1, 1)
        return Match(node, kind, size, weight, bias, (1, 1), (0, 0, 0, 0), Activation(x, 1),
                     Activation(node, 1))  # fmt: skip
    stride2, sides = pair(argument(node, "stride", 1)), _padding(node, w.shape)
    if stride2 is None or sides is None or not within_limits(w.shape, stride2, sides):
        return None
    return Match(node, kind, (w.shape[2], w.shape[3]), weight, bias, stride2, sides,
                 Activation(x, 1), Activation(node, 1))  # fmt: skip


def _padding(node: Node, size: torch.Size) -> tuple[int, int, int, int] | None:
    given = argument(node, "padding", 0)
    if given == "valid":
        return 0, 0, 0, 0
    if given == "same":
        if pair(argument(node, "stride", 1)) != (1, 1):
            return None
        (top, left), (h, w) = ((size[2] - 1) // 2, (size[3] - 1) // 2), size[2:]
        return top, h - 1 - top, left, w - 1 - left
    both = pair(given)
    return None if both is None else (both[0], both[0], both[1], both[1])
