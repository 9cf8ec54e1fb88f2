"""The probability-flow ODE, solved to a tolerance: images to noise and back, without chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from fastdiff.sde.process import SDE
from fastdiff.sde.reverse import probability_flow
from fastdiff.sde.runge_kutta import Field, Integrated, integrate
from fastdiff.sde.score import Score

IndexedScore = Callable[[Tensor, Tensor, Tensor], Tensor]


def solve_ode(
    score: Score | IndexedScore,
    sde: SDE,
    x: Tensor,
    *,
    backward: bool = True,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    max_evaluations: int = 100_000,
    conditioned: bool = False,
    progress: bool = False,
) -> Integrated:
    """Follow dx/dt = f x - g^2 score / 2 between noise at ``sde.end`` and images at
    ``sde.smallest`` (Song et al. 2021, arXiv:2011.13456, eq. 13 and section D.1).

    Every image has step sizes of its own, and those that have arrived leave the batch: the score is
    called with fewer and fewer of them. A score that knows more of an image than x and t, such as
    its class, must therefore be told which images it is given: see ``conditioned``.

    Args:
        score: ``(x [M, ...], t float64 [M])`` -> grad log p_t(x), like x.
        sde: the forward process.
        x: noise [N, ...], or images if ``backward`` is false, floating point.
        backward: from noise to images; else from images to noise.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        method: see :func:`fastdiff.sde.runge_kutta.integrate`.
        max_evaluations: of the score, for any one image.
        conditioned: whether the score takes a third argument, the places int64 [M] in the batch of
            the images it is given: ``lambda x, t, i: score_fn(model, kind, sde, y=y[i])(x, t)``.
        progress: show a bar.

    Raises:
        TypeError, ValueError, FloatingPointError, StuckError: as ``integrate`` does.
    """
    start, stop = (sde.end, sde.smallest) if backward else (sde.smallest, sde.end)
    return integrate(
        _flow(score, sde, conditioned), x, start, stop, rtol=rtol, atol=atol, method=method,
        max_evaluations=max_evaluations, progress=progress,
    )  # fmt: skip


def score_of_rows(score: Score | IndexedScore, conditioned: bool, index: Tensor) -> Score:
    """The score of the images at places ``index`` int64 [M] of a batch."""
    if not conditioned:
        return cast(Score, score)
    indexed = cast(IndexedScore, score)
    return lambda x, t: indexed(x, t, index)


def _flow(score: Score | IndexedScore, sde: SDE, conditioned: bool) -> Field:
    def field(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return probability_flow(sde, score_of_rows(score, conditioned, index)).drift(x, t)

    return field
