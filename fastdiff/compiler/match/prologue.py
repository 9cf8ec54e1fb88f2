"""The prologue of a fused convolution: what it computes of its input before it convolves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from fastdiff.compiler.graph.nodes import argument, op, value
from fastdiff.compiler.graph.reshapes import same_pixels, step_up
from fastdiff.compiler.match.fused import Activation, Match
from fastdiff.compiler.match.patterns import (
    Norm,
    Readers,
    is_cast,
    is_transparent,
    multiple_of,
    norm_of,
    pair_of,
    per_channel,
    repeats,
    zero_padding,
)
from fastdiff.ops.conv2d_algorithms import within_limits
from fastdiff.ops.conv2d_spec import ConvSpec


def prologue(match: Match, readers: Readers, pinned: set[Node], *, gains: bool = False) -> None:
    """Walk up from the anchor's input.

    After each step that leaves a prologue which can be fused, that prologue is written to
    ``match``. A later step that cannot be fused leaves ``match`` as it was last written.

    Args:
        match: the anchor, to which the prologue is added.
        readers: which nodes only prologues read.
        pinned: nodes that must stay as they are.
        gains: whether channels may be multiplied by gains without a norm.
    """
    here, spatial = match.x, not match.spec.pointwise
    norm: Norm | None = None
    factor, gain = match.factor, match.gain
    spec, seen = match.spec, list[str]()
    while True:
        node, channel = here.node, here.channel
        if node in pinned:
            return
        kind, result = op(node), value(node)
        assert result is not None
        is_image = channel == 1 and result.ndim > 2
        mine, stepped = readers.only_prologues(node), None
        if is_transparent(node) or (is_cast(node) and match.dtype == torch.bfloat16):
            here = Activation(node.args[0], channel)  # type: ignore[arg-type]
        elif kind == "pad" and spatial and not seen and (sides := zero_padding(node)) is not None:
            padding = tuple(a + b for a, b in zip(spec.padding, sides, strict=True))
            spec = replace(spec, padding=padding)  # type: ignore[arg-type]
            if not within_limits(spec):
                return
            here = Activation(argument(node, "input"), channel)
            seen.append("pad")
        elif kind == "interpolate" and spatial and mine and (up := _upsampled(spec, node)):
            spec = up
            here = Activation(argument(node, "input"), channel)
            seen.append("upsample")
        elif (
            not spec.silu and norm is gain is None and mine and (m := multiple_of(node)) is not None
        ):
            here, factor = Activation(m[0], channel), factor * m[1]
        elif kind == "silu" and not spec.silu and norm is gain is None and mine:
            spec = replace(spec, silu=True)
            here = Activation(argument(node, "input"), channel)
            seen.append("silu")
        elif (
            norm is gain is None and is_image and mine and (n := norm_of(node, readers)) is not None
        ):
            if pinned & {n.node, n.last}:
                return
            norm, here = n, Activation(argument(n.node, "input"), channel)
            seen.append("norm")
        elif (
            gains and norm is gain is None and is_image and mine and kind == "mul"
            and (operands := per_channel(node)) is not None
        ):  # fmt: skip
            here, gain = Activation(operands[0], channel), operands[1]
            seen.append("gain")
        elif is_image and (both := pair_of(node)) is not None:
            shares = (1.0, 1.0)
            if gains and norm is gain is None:
                first, second = (multiple_of(part) or (part, 1.0) for part in both)
                both, shares = (first[0], second[0]), (first[1], second[1])
            here = Activation(both[0], channel)
            if _fits(match, here) and (match.kind == "conv2d" or norm is not None):
                match.skip, match.shares = both[1], shares
                _keep(match, here, norm, spec, [*seen, "cat"], factor, gain)
            return
        else:
            stepped = None if spatial else step_up(node, channel)
            if stepped is None:
                return
            here = Activation(*stepped)
        # A view alone saves nothing. With a norm, x may be a match that collects its statistics.
        if (stepped is None or norm is not None) and _fits(match, here):
            _keep(match, here, norm, spec, seen, factor, gain)


def _keep(
    match: Match,
    x: Activation,
    norm: Norm | None,
    spec: ConvSpec,
    seen: list[str],
    factor: float,
    gain: Node | None,
) -> None:
    match.factor, match.gain = factor, gain
    match.x, match.norm, match.spec = x, norm, spec
    match.absorbed = list(reversed(seen))


def _upsampled(spec: ConvSpec, node: Node) -> ConvSpec | None:
    """A convolution of what an interpolation is given, in place of its result; None if none is."""
    times = repeats(node)
    if times is None or spec.upsample:
        return None
    if times == (2, 2):
        return replace(spec, upsample=True)
    # Rows are convolved one by one, so the second of each pair of equal rows can be skipped.
    one_by_one = spec.kernel[0] == 1 and spec.stride[0] == 1 and spec.padding[:2] == (0, 0)
    return replace(spec, upsample=True, stride=(2, spec.stride[1])) if one_by_one else None


def _fits(match: Match, x: Activation) -> bool:
    """Whether the anchor can read x: x has its dtype, and pixels that fit those of the result."""
    source, result = value(x.node), value(match.anchor)
    if source is None or result is None or source.dtype != match.dtype or source.ndim > 4:
        return False
    if match.kind == "conv2d" and not match.spec.pointwise:
        return True
    if source.ndim == 2 or result.ndim == 3:
        return (source.ndim == 2) == (result.ndim == 2)
    return same_pixels(source.shape, x.channel, result.shape, match.end.channel)
