"""The order of each step of a multistep method: low at the start, perhaps again at the end."""

from __future__ import annotations

import math

from fastdiff.samplers.grids import Point

STABLE_STEPS = 15  # with fewer steps, the last ones are taken at lower orders for stability


def lowers_final(lower_order_final: bool | None, steps: int) -> bool:
    """``lower_order_final`` itself, or the default that None stands for in a run of ``steps``."""
    return steps < STABLE_STEPS if lower_order_final is None else lower_order_final


def multistep_order(points: list[Point], i: int, order: int, lower_order_final: bool) -> int:
    """The order of step i: at most ``order``, and at most the number of values it can use.

    A step can use the values at points of finite lambda up to its own start. It has order 1 if
    lambda is infinite at one of its ends. With ``lower_order_final`` the order is also at most the
    number of steps that are left.
    """
    steps = len(points) - 1
    if not math.isfinite(points[i + 1].lam - points[i].lam):
        return 1
    if lower_order_final:
        order = min(order, steps - i)
    return sum(math.isfinite(point.lam) for point in points[max(i + 1 - order, 0) : i + 1])
