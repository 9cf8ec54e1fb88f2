"""The epilogue of a fused convolution: additions, scales and views of its result."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from fastdiff import ops
from fastdiff.compiler.graph.nodes import argument, dtype_of, is_number, op, same_sizes, value
from fastdiff.compiler.graph.reshapes import step_down
from fastdiff.compiler.match.fused import Activation, Match
from fastdiff.compiler.match.patterns import (
    is_per_channel,
    is_transparent,
    scale_of,
    weighted_sum,
)
from fastdiff.ops.conv2d_algorithms import computable


def epilogue(match: Match, claimed: set[Node], pinned: set[Node], *, factors: bool) -> None:
    """Walk down from the anchor while each value has one reader that can be fused.

    Args:
        match: what is found is added to it.
        claimed: nodes that belong to a match; those of the epilogue are added.
        pinned: nodes that must stay as they are.
        factors: whether the weight may be multiplied by a constant.
    """
    here, waiting = match.end, False  # waiting: views are fused only up to a residual after them
    path: list[Node] = []
    while True:
        users = list(here.node.users)
        if len(users) != 1 or users[0] in pinned or users[0] in claimed:
            return
        node, result = users[0], value(users[0])
        if result is None or result.dtype != match.dtype:
            return
        kind, channel = op(node), here.channel
        if is_transparent(node):
            here = Activation(node, channel)
        elif match.spec.gated:
            return
        elif node.target is ops.geglu and not waiting and _may_be_gated(match, here):
            match.spec = replace(match.spec, gated=True)
            match.absorbed.append("geglu")
            here = Activation(node, channel)
        elif factors and _adds_weighted(match, node, here.node):
            waiting = False
            here = Activation(node, channel)
        elif kind == "add" and not match.scale:
            other = _other(node, here.node)
            if other is None:
                return
            if (
                match.emb is None and not waiting and channel == 1
                and _adds_emb(node, here.node, other)
            ):  # fmt: skip
                match.emb = other
                match.absorbed.append("emb")
            elif match.residual is None and _adds_residual(node, here.node, other):
                match.residual, waiting = other, False
                match.absorbed.append("residual")
            else:
                return
            here = Activation(node, channel)
        elif (
            kind in ("mul", "div") and not waiting and (s := scale_of(node, here.node)) is not None
        ):
            if s[0] != 1 or not is_number(s[0]):
                match.scale.append(s)
                match.absorbed.append("scale")
            here = Activation(node, channel)
        elif match.spec.pointwise and match.residual is None and not match.scale:
            moved = step_down(node, channel)
            if moved is None or result.ndim not in (3, 4):
                return
            here, waiting = Activation(node, moved), True
        else:
            return
        path.append(node)
        if not waiting:
            match.end = here
            claimed.update(path)


def _adds_weighted(match: Match, node: Node, mine: Node) -> bool:
    """Let a match compute a weighted sum of what it computes, ``mine``, and a residual.

    a conv(x) + b r is (conv'(x) + r) b, where the weight of conv' is a / b times that of conv.
    A plain sum is left to the caller.
    """
    both = weighted_sum(node, mine)
    if both is None or not all(is_number(s) and s != 0 for s, _ in match.scale):
        return False
    if not match.scale and both[0] == both[2] == 1:
        return False
    if any(added is not None for added in (match.bias, match.emb, match.residual)):
        return False
    weight, other, of_other = both
    if other is mine or value(other) is None or not _adds_residual(node, mine, other):
        return False
    for scale, times in match.scale:
        weight = weight * scale if times else weight / scale
    match.factor *= weight / of_other
    match.residual = other
    match.scale = [] if of_other == 1 else [(of_other, True)]
    match.absorbed = [name for name in match.absorbed if name != "scale"]
    match.absorbed += ["residual"] if of_other == 1 else ["residual", "scale"]
    return True


def _may_be_gated(match: Match, here: Activation) -> bool:
    plain = match.emb is None and match.residual is None and not match.scale
    last = match.spec.pointwise and here.channel == here.form[0] - 1
    return plain and last and computable(replace(match.spec, gated=True), match.dtype)


def _other(node: Node, mine: Node) -> Node | None:
    a, b = argument(node, "input"), argument(node, "other")
    other = b if a is mine else a
    return other if other is not mine and value(other) is not None else None


def _adds_emb(node: Node, mine: Node, other: Node) -> bool:
    a, result = value(mine), value(node)
    assert a is not None
    assert result is not None
    same = same_sizes(a.shape, result.shape) and dtype_of(other) == a.dtype
    return same and is_per_channel(other, result)


def _adds_residual(node: Node, mine: Node, other: Node) -> bool:
    a, b, result = value(mine), value(other), value(node)
    assert a is not None
    assert b is not None
    assert result is not None
    same = same_sizes(a.shape, b.shape) and same_sizes(a.shape, result.shape)
    return same and b.dtype == a.dtype
