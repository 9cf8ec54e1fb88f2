"""The probability-flow ODE, solved to a tolerance: noise to images or images to noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fastdiff.common.checks import beside
from fastdiff.sde.processes import SDE
from fastdiff.sde.reverse import probability_flow
from fastdiff.sde.score import Score
from fastdiff.sde.solvers.rounding import MAX_EVALUATIONS
from fastdiff.sde.solvers.runge_kutta import Field, Integrated, integrate

IndexedScore = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t, the images' numbers) -> score


def solve_ode(
    score: Score | IndexedScore,
    sde: SDE,
    x: Tensor,
    *,
    backward: bool = True,
    rtol: float | None = None,
    atol: float | None = None,
    method: str = "dopri5",
    max_evaluations: int = MAX_EVALUATIONS,
    conditioned: bool = False,
    progress: bool = False,
) -> Integrated:
    """Follow dx/dt = f x - g^2 score / 2 between noise at ``sde.end`` and images at
    ``sde.smallest`` (Song et al. 2021, arXiv:2011.13456, eq. 13 and section D.1).

    Every image has its own step sizes, and finished images leave the batch: the score is called
    with fewer and fewer images. A score that depends on more than x and t, such as the class of an
    image, must therefore know which images it gets: see ``conditioned``.

    Args:
        score: ``(x [M, ...], t float64 [M])`` -> grad log p_t(x), like x.
        sde: the forward process.
        x: noise [N, ...], or images if ``backward`` is false, floating point.
        backward: from noise to images; if False from images to noise.
        rtol: relative tolerance of a step; None depends on the dtype of x, see ``integrate``.
        atol: absolute tolerance of a step; None depends on the dtype of x, see ``integrate``.
        method: see :func:`fastdiff.sde.solvers.runge_kutta.integrate`.
        max_evaluations: limit of score evaluations for any one image.
        conditioned: whether the score takes a third argument, int64 [M], the numbers in the batch
            of its M images: ``lambda x, t, i: score_fn(model, kind, sde, y=y[i])(x, t)``.
        progress: show a progress bar on standard error.

    Returns:
        The images or the noise, like ``x``, with the numbers of evaluations and steps.

    Raises:
        TypeError, ValueError, FloatingPointError, StuckError: the errors of ``integrate``.
    """
    start, stop = (sde.end, sde.smallest) if backward else (sde.smallest, sde.end)
    return integrate_along(
        sde, _flow(score, sde, conditioned), x, start, stop, rtol=rtol, atol=atol, method=method,
        max_evaluations=max_evaluations, progress=progress,
    )  # fmt: skip


def integrate_along(
    sde: SDE, field: Field, x: Tensor, start: float, stop: float, **options: Any
) -> Integrated:
    """Solve dx/dt = field(x, t), the flow of a process, between two of its positive times.

    If f and g^2 jump at the timesteps of a schedule, the solver takes steps in lambda =
    log(alpha / sigma) instead of t: d lambda / dt = -g^2 / (2 sigma^2), so that the probability
    flow is dx / d lambda = sigma^2 (score - (2 f / g^2) x), which does not jump (compare
    DPM-Solver, Lu et al. 2022, arXiv:2206.00927, section 3.1). Steps in t took five times the
    evaluations at a tolerance of 1e-5, and the errors were hundreds of times the tolerance.

    Args:
        sde: the process.
        field: the right-hand side, see ``integrate``.
        x: states at ``start``.
        start: the time of ``x``.
        stop: the time of the result.
        options: further arguments of ``integrate``.
    """
    if not sde.jumps:
        return integrate(field, x, start, stop, **options)
    low, high = sorted((start, stop))

    def time(position: Tensor) -> Tensor:
        return sde.time_at(torch.exp(-position)).clamp(low, high)

    def by_lambda(x: Tensor, position: Tensor, index: Tensor) -> Tensor:
        t = time(position)
        _, squared = sde.rates(t)
        _, sigma = sde.levels(t)
        return (beside(-2 * sigma**2 / squared, x) * field(x, t, index)).to(x.dtype)

    alpha, sigma = sde.levels(torch.tensor([start, stop], dtype=torch.float64, device="cpu"))
    return integrate(by_lambda, x, *(alpha / sigma).log().tolist(), time=time, **options)


def score_of_rows(score: Score | IndexedScore, conditioned: bool, index: Tensor) -> Score:
    """The score as a function of x and t for the images of numbers ``index``, int64 [M]."""
    if not conditioned:
        return cast(Score, score)
    indexed = cast(IndexedScore, score)
    return lambda x, t: indexed(x, t, index)


def _flow(score: Score | IndexedScore, sde: SDE, conditioned: bool) -> Field:
    def field(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return probability_flow(sde, score_of_rows(score, conditioned, index)).drift(x, t)

    return field
