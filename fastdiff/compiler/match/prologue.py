"""What a convolution reads through."""

from __future__ import annotations

import torch
from torch.fx import Node

from fastdiff.compiler.graph.nodes import argument, op, value
from fastdiff.compiler.graph.reshapes import same_pixels, step_up
from fastdiff.compiler.match.fused import Activation, Match
from fastdiff.compiler.match.patterns import (
    Norm,
    Readers,
    doubles,
    is_cast,
    is_transparent,
    norm_of,
    pair_of,
    zero_padding,
)
from fastdiff.ops.conv2d import LARGEST


def prologue(match: Match, readers: Readers, frozen: set[Node]) -> None:
    """Walk up from the anchor's input; keep what was seen up to where it makes a whole."""
    here, spatial = match.x, not match.pointwise
    norm: Norm | None = None
    silu = upsample = False
    padding, seen = match.padding, list[str]()
    while True:
        node, channel = here.node, here.channel
        if node in frozen:
            return
        kind, found = op(node), value(node)
        assert found is not None
        is_image = channel == 1 and found.ndim > 2
        mine, stepped = readers.only_prologues(node), None
        if is_transparent(node) or (is_cast(node) and match.dtype == torch.bfloat16):
            here = Activation(node.args[0], channel)  # type: ignore[arg-type]
        elif kind == "pad" and spatial and not seen and (sides := zero_padding(node)) is not None:
            wider = tuple(a + b for a, b in zip(padding, sides, strict=True))
            if max(wider) > LARGEST:
                return
            padding = wider  # type: ignore[assignment]
            here = Activation(argument(node, "input"), channel)
            seen.append("pad")
        elif kind == "interpolate" and spatial and not upsample and mine and doubles(node):
            upsample, here = True, Activation(argument(node, "input"), channel)
            seen.append("upsample")
        elif kind == "silu" and not silu and norm is None and mine:
            silu, here = True, Activation(argument(node, "input"), channel)
            seen.append("silu")
        elif norm is None and is_image and mine and (n := norm_of(node, readers)) is not None:
            if frozen & {n.node, n.last}:
                return
            norm, here = n, Activation(argument(n.node, "input"), channel)
            seen.append("norm")
        elif is_image and (both := pair_of(node)) is not None:
            here = Activation(both[0], channel)
            if _fits(match, here) and (match.kind == "conv2d" or norm is not None):
                match.skip = both[1]
                _keep(match, here, norm, silu, upsample, padding, [*seen, "cat"])
            return
        else:
            stepped = None if spatial else step_up(node, channel)
            if stepped is None:
                return
            here = Activation(*stepped)
        # A view alone is no gain; behind a norm it leads to who collected the statistics.
        if (stepped is None or norm is not None) and _fits(match, here):
            _keep(match, here, norm, silu, upsample, padding, seen)


def _keep(
    match: Match,
    x: Activation,
    norm: Norm | None,
    silu: bool,
    upsample: bool,
    padding: tuple[int, int, int, int],
    seen: list[str],
) -> None:
    match.x, match.norm, match.silu = x, norm, silu
    match.upsample, match.padding = upsample, padding
    match.absorbed = list(reversed(seen))


def _fits(match: Match, x: Activation) -> bool:
    """Whether the anchor can read x: its dtype, and pixels that the result can be given in."""
    found, result = value(x.node), value(match.anchor)
    if found is None or result is None or found.dtype != match.dtype or found.ndim > 4:
        return False
    if match.kind == "conv2d" and not match.pointwise:
        return True
    if found.ndim == 2 or result.ndim == 3:
        return (found.ndim == 2) == (result.ndim == 2)
    return same_pixels(found.shape, x.channel, result.shape, match.end.channel)
