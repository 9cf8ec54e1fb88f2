"""From noise to images in a fixed number of steps: the loop over predictors and correctors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.checks import wide_dtype
from fastdiff.common.inputs import check_choice
from fastdiff.sde.processes import EDM, SDE
from fastdiff.sde.score import Score
from fastdiff.sde.solvers.known_part import Known, check_known
from fastdiff.sde.solvers.langevin import CORRECTORS, Level
from fastdiff.sde.solvers.predictors import METHODS, Steps
from fastdiff.sde.solvers.stepping import (
    CheckedScore,
    check_count,
    check_images,
    check_positive,
    normal,
    with_progress,
)

KARRAS_RHO = 7  # exponent of EDM's time grid


@torch.no_grad()
def solve(
    score: Score,
    sde: SDE,
    x_T: Tensor,
    steps: int,
    *,
    method: str = "euler-maruyama",
    corrector: str | None = None,
    snr: float = 0.16,
    corrector_steps: int = 1,
    denoise: bool = True,
    start: float | None = None,
    known: Known | None = None,
    generator: torch.Generator | None = None,
    check_finite: bool = False,
    progress: bool | str = True,
) -> Tensor:
    """Solve the reverse-time SDE, or the probability-flow ODE, in a fixed number of steps.

    Predictor and corrector alternate as in Song et al. 2021, arXiv:2011.13456, algorithms 2 to 5,
    on the times of :func:`time_grid`. Coefficients are float64, and x is kept in float32 or
    float64. The score is evaluated ``steps`` times, ``corrector_steps`` times more after each step
    if there is a corrector, and once more to denoise.

    Args:
        score: the score of the process, from :func:`fastdiff.sde.score_fn` or any (x, t) -> like x;
            t is float64 [N] on x's device.
        sde: the process that leads from images to noise.
        x_T: noise of the prior, [N, ...], floating point; or noised images of time ``start``.
        steps: number of steps, at least 1.
        method: the predictor,

            euler-maruyama     Euler-Maruyama for the reverse-time SDE
            reverse-diffusion  the reverse SDE, discretised like the forward SDE
            ancestral          the posterior of the step's end, given the x_0 that the score implies
            probability-flow   Euler's method for the ODE, without noise

        corrector: the corrector that is applied after each step, at its end,

            None               nothing
            langevin           Langevin steps whose update has the signal-to-noise ratio ``snr``
            annealed-langevin  Langevin steps of size 2 alpha (snr sigma)^2

        snr: the corrector's signal-to-noise ratio.
        corrector_steps: number of corrector steps after each step.
        denoise: end with the mean of x_0 given x at the smallest time (Tweedie's formula), in one
            more evaluation; without it some noise is left (Jolicoeur-Martineau et al. 2021,
            arXiv:2105.14080).
        start: the time of x_T; None for the process's end.
        known: a part of the images that is restored after each step and each corrector, with new
            noise, and at the end without any: ``known_pixels`` or ``known_grey``.
        generator: source of all noise, None for PyTorch's global generator.
        check_finite: check every score, which waits for the device.
        progress: show a progress bar on standard error; a string is its label.

    Returns:
        Images like ``x_T``.

    Raises:
        TypeError: ``x_T`` is not floating point, a number of steps is no whole number, or a score
            is no tensor.
        ValueError: an unknown method or corrector; a number of steps below 1, an snr that is not
            positive, an ``x_T`` without dimensions beside N, a ``start`` outside the process's
            times, a known part that does not fit; a score of another shape than x.
        FloatingPointError: with ``check_finite``, the score is not finite.
    """
    check_choice("method", method, METHODS)
    if corrector is not None:
        check_choice("corrector", corrector, CORRECTORS)
    check_images(x_T, "x_T")
    check_positive(snr, "snr")
    corrector_steps = check_count(corrector_steps, "corrector_steps")
    plan = Steps(sde, time_grid(sde, steps, start))
    rows = list(zip(*(column.tolist() for column in METHODS[method](plan)), strict=True))
    (alphas, sigmas) = (level.tolist() for level in plan.levels)
    signal_kept = plan.signal_kept.tolist()
    times = plan.times.to(x_T.device)

    evaluate, x = CheckedScore(score, x_T.dtype, check_finite), x_T.to(wide_dtype(x_T.dtype))
    if known is not None:
        check_known(known, x)

    def restored(x: Tensor, end: int) -> Tensor:
        """x with the known part at the level that step ``end`` begins with."""
        if known is None:
            return x
        return known.restore(x, alphas[end], sigmas[end], normal(x, generator))

    for i in with_progress(len(rows), progress):
        of_x, of_score, of_noise = rows[i]
        gradient = evaluate(x, times[i], f"step {i}")
        x = of_x * x + of_score * gradient
        if of_noise:
            x.add_(normal(x, generator), alpha=of_noise)
        x = restored(x, i + 1)
        if corrector is not None:
            level = Level(sigmas[i + 1], signal_kept[i] ** 2)
            for _ in range(corrector_steps):
                gradient = evaluate(x, times[i + 1], f"step {i}, corrector")
                z = normal(x, generator)
                size = CORRECTORS[corrector](gradient, z, level, snr)
                x = restored(x + size * gradient + (2 * size).sqrt() * z, i + 1)
    if denoise:
        gradient = evaluate(x, times[-1], "the last denoising step")
        x = (x + sigmas[-1] ** 2 * gradient) / alphas[-1]
    if known is not None:
        x = known.restore(x, 1.0, 0.0, None)
    return x.to(x_T.dtype)


def time_grid(sde: SDE, steps: int, start: float | None = None) -> Tensor:
    """The times at which ``steps`` steps begin and end, float64 [steps + 1], decreasing.

    They run from ``start`` (None for ``sde.end``) to ``sde.smallest``, evenly spaced in t or, for
    ``EDM``, in t^(1/7) (Karras et al. 2022, arXiv:2206.00364, eq. 5).

    Raises:
        TypeError: ``steps`` is no whole number.
        ValueError: ``steps`` below 1, or a start outside smallest..end.
    """
    steps = check_count(steps, "steps")
    first, last = sde.end if start is None else start, sde.smallest
    if not last < first <= sde.end:
        raise ValueError(f"start must be more than {last:g} and at most {sde.end:g}, got {first}")
    power = KARRAS_RHO if isinstance(sde, EDM) else 1
    ends = first ** (1 / power), last ** (1 / power)
    times = torch.linspace(*ends, steps + 1, dtype=torch.float64, device="cpu") ** power
    times[0], times[-1] = first, last  # exactly: the power may have rounded them
    return times
