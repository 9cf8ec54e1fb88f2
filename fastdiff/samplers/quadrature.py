"""Integrals of interpolating polynomials: the weights of multistep methods."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)

Values = npt.NDArray[np.float64]


def lagrange_integrals(
    nodes: list[float],
    start: float,
    end: float,
    weight: Callable[[Values], Values] = np.ones_like,
) -> list[float]:
    """The integral from start to end of weight(u) l_j(u), for each Lagrange polynomial l_j.

    Args:
        nodes: the nodes u_i of the interpolation: l_j(u_i) is 1 if i = j, else 0.
        start: lower limit.
        end: upper limit.
        weight: a smooth function. The Gauss-Legendre rule of 24 points is exact for polynomials up
            to degree 47, and exact to rounding for e^u over the steps of samplers.
    """
    half = (end - start) / 2
    u = (start + end) / 2 + half * _NODES
    out = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        basis = np.ones_like(u)
        for other in others:
            basis *= (u - other) / (node - other)
        out.append(float(half * np.sum(_WEIGHTS * weight(u) * basis)))
    return out
