"""What the layouts of other programs' U-Nets have in common: parts, tables of names, options.

A layout reads the architecture from the names and shapes of the tensors, and renames the tensors
by tables: (their layer, our layer) for each kind of part. :func:`parts` lists the parts of our
U-Net in the order of the calls; a layout says how its program names each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdiff.common.errors import CheckpointError
from fastdiff.nn.config import UNet2DConfig

Table = Mapping[str, Iterable[tuple[str, str]]]  # of each kind of part: (their layer, our layer)
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How one family of programs names the weights of its U-Net.

    Attributes:
        name: of the programs.
        marks: endings of names that every file of this layout has, and no file of another; what
            stands before the first of them, such as module., is dropped from every name.
        convert: (weights by their names, options) -> configuration and weights by our names.
        options: for each option that ``convert`` takes its type and what it is. They are facts
            that the tensors do not tell.
    """

    name: str
    marks: tuple[str, ...]
    convert: Callable[[State, Mapping[str, Any]], tuple[UNet2DConfig, dict[str, Tensor]]]
    options: Mapping[str, tuple[type, str]]

    def prefix(self, names: Iterable[str]) -> str | None:
        """What stands before the layout's names; None for weights of another layout."""
        ordered = list(names)
        known = set(ordered)
        for name in ordered:
            prefix = name.removesuffix(self.marks[0])
            whole = name.endswith(self.marks[0]) and (not prefix or prefix.endswith("."))
            if whole and all(prefix + mark in known for mark in self.marks):
                return prefix
        return None

    def check(self, options: Mapping[str, Any]) -> None:
        """CheckpointError for an option that the layout does not have, or of a wrong type."""
        for name, value in options.items():
            if name not in self.options:
                known = ", ".join(self.options)
                raise CheckpointError(
                    f"takes no option {name!r}{f'; its options are {known}' if known else ''}"
                )
            kind = self.options[name][0]
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise CheckpointError(f"needs {name} to be {kind.__name__}, got {value!r}")


@dataclass(frozen=True)
class Part:
    """A part of our U-Net.

    Attributes:
        name: of the module, such as ``down_blocks.0.resnets.1``.
        kind: resnet, attention, or one of down_resnet, down_conv, up_resnet, up_conv, which
            change the resolution.
        way: down, mid or up.
        level: 0 has the full resolution.
        index: of the residual block or attention in its level.
        last: whether this is the last residual block or attention of its level.
    """

    name: str
    kind: str
    way: str
    level: int
    index: int = 0
    last: bool = False


def parts(config: UNet2DConfig) -> Iterator[Part]:
    """All parts between the first and the last convolution, in the order of the calls."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    for level, kind in enumerate(config.down_block_types):
        yield from _blocks(f"down_blocks.{level}", "down", level, layers, "Attn" in kind)
        if level + 1 < levels:
            kind = f"down_{config.downsample_type}"
            yield Part(f"down_blocks.{level}.downsamplers.0", kind, "down", level)
    yield Part("mid_block.resnets.0", "resnet", "mid", levels - 1)
    yield Part("mid_block.attentions.0", "attention", "mid", levels - 1)
    yield Part("mid_block.resnets.1", "resnet", "mid", levels - 1, 1)
    for place, kind in enumerate(config.up_block_types):
        level = levels - 1 - place
        yield from _blocks(f"up_blocks.{place}", "up", level, layers + 1, "Attn" in kind)
        if level:
            kind = f"up_{config.upsample_type}"
            yield Part(f"up_blocks.{place}.upsamplers.0", kind, "up", level)


def _blocks(name: str, way: str, level: int, count: int, attention: bool) -> Iterator[Part]:
    for index in range(count):
        last = index + 1 == count
        yield Part(f"{name}.resnets.{index}", "resnet", way, level, index, last)
        if attention:
            yield Part(f"{name}.attentions.{index}", "attention", way, level, index, last)


def make_config(
    *, widths: Iterable[int], attention: Iterable[int], resampling: str, **options: Any
) -> UNet2DConfig:
    """The configuration of a U-Net whose levels are all built in one way.

    Args:
        widths: channels of each level.
        attention: the levels with attention.
        resampling: conv or resnet, between the levels.
        **options: further options of ``UNet2DConfig``.

    Raises:
        CheckpointError: a configuration that UNet2DModel does not support.
    """
    widths, attention = tuple(widths), set(attention)
    plain = "DownBlock2D" if resampling == "conv" else "ResnetDownsampleBlock2D"
    down = ["AttnDownBlock2D" if i in attention else plain for i in range(len(widths))]
    up = [kind.replace("Downsample", "Upsample").replace("Down", "Up") for kind in down[::-1]]
    try:
        return UNet2DConfig(
            block_out_channels=widths,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            downsample_type=resampling,
            upsample_type=resampling,
            **options,
        )
    except ValueError as error:
        raise CheckpointError(f"cannot be a UNet2DModel: {error}") from None


class Renaming:
    """Weights on their way from their names to ours; each is taken once."""

    def __init__(self, theirs: State) -> None:
        self._left = dict(theirs)
        self._ours: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """The tensor of that name; CheckpointError if there is none."""
        if name not in self._left:
            raise CheckpointError(f"has no {name}, which this layout needs")
        return self._left.pop(name)

    def drop(self, *names: str) -> None:
        """Leave out tensors that are no weights, if they are there."""
        for name in names:
            self._left.pop(name, None)

    def has(self, name: str) -> bool:
        """Whether a tensor of that name is left."""
        return name in self._left

    def put(self, name: str, value: Tensor) -> None:
        """Set a tensor by our name."""
        self._ours[name] = value

    def move(
        self, theirs: str, ours: str, change: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Move weight and bias of a layer, the weight through ``change``."""
        weight = self.take(f"{theirs}.weight")
        self._ours[f"{ours}.weight"] = weight if change is None else change(weight)
        self._ours[f"{ours}.bias"] = self.take(f"{theirs}.bias")

    def finish(self) -> dict[str, Tensor]:
        """The weights by our names; CheckpointError if tensors are left over."""
        if self._left:
            more = f" and {len(self._left) - 1} more" if len(self._left) > 1 else ""
            raise CheckpointError(
                f"has the tensor {next(iter(self._left))}{more}, which this layout does not know"
            )
        return self._ours


def size(state: State, name: str, dim: int) -> int:
    """The size of a tensor in a dimension; CheckpointError if there is no such dimension."""
    if name not in state:
        raise CheckpointError(f"has no {name}, which this layout needs")
    shape = tuple(state[name].shape)
    if dim >= len(shape):
        raise CheckpointError(f"has {name} of shape {shape}, which has too few dimensions")
    return shape[dim]


def indices(state: State, pattern: str) -> list[int]:
    """The distinct numbers that the group of ``pattern`` matches at the start of names, sorted."""
    matches = (re.match(pattern, name) for name in state)
    return sorted({int(match[1]) for match in matches if match})


def as_linear(weight: Tensor) -> Tensor:
    """The weight [out, in] of a linear layer, from that of a convolution with kernel size 1."""
    if weight.ndim < 2 or any(extent != 1 for extent in weight.shape[2:]):
        raise CheckpointError(
            f"has a projection of shape {tuple(weight.shape)}, wanted a convolution of size 1"
        )
    return weight.flatten(1)
