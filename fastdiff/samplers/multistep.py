"""Which order a step of a multistep method has: it rises at the start and may fall at the end."""

from __future__ import annotations

import math

from fastdiff.samplers.grids import Point

FEW_STEPS = 15  # below which the last steps are taken at lower orders, for stability


def lowers_final(lower_order_final: bool | None, steps: int) -> bool:
    """``lower_order_final`` itself, or what None means for a run of so many steps."""
    return steps < FEW_STEPS if lower_order_final is None else lower_order_final


def multistep_order(points: list[Point], i: int, order: int, lower_order_final: bool) -> int:
    """The order that step i of a multistep method can have.

    It needs earlier points, at finite lambda as the end of the step must be.
    """
    steps = len(points) - 1
    if not math.isfinite(points[i + 1].lam - points[i].lam):
        return 1
    if lower_order_final:
        order = min(order, steps - i)
    return sum(math.isfinite(point.lam) for point in points[max(i + 1 - order, 0) : i + 1])
