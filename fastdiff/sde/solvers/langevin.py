"""Langevin dynamics at one noise level: correctors, and annealed Langevin dynamics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.common.checks import wide_dtype
from fastdiff.sde.score import Score
from fastdiff.sde.solvers.stepping import (
    CheckedScore,
    check_count,
    check_images,
    check_positive,
    normal,
    with_progress,
)


@dataclass(frozen=True)
class Level:
    """The noise level at which a corrector works.

    Attributes:
        sigma: standard deviation of the noise.
        alpha: alpha_i = 1 - beta_i of the papers, the squared factor by which the forward process
            scales the signal over the step just undone; 1 for processes that do not scale it.
    """

    sigma: float
    alpha: float


def langevin(score: Tensor, z: Tensor, level: Level, snr: float) -> Tensor:
    """The step size 2 alpha (snr |z| / |score|)^2, [N, 1, ...].

    Song et al. 2021, arXiv:2011.13456, alg. 4 and 5. Norms are taken per image, so that an image
    does not depend on the rest of the batch; the paper's code takes their means over the batch. The
    step is 0 where the score is 0.
    """
    dims = tuple(range(1, score.ndim))
    noise = torch.linalg.vector_norm(z, dim=dims, keepdim=True)
    gradient = torch.linalg.vector_norm(score, dim=dims, keepdim=True)
    step = 2 * level.alpha * (snr * noise / gradient) ** 2
    return torch.where(gradient > 0, step, 0.0)


def annealed(score: Tensor, z: Tensor, level: Level, snr: float) -> Tensor:
    """The step size 2 alpha (snr sigma)^2, in proportion to the noise's variance.

    The steps of annealed Langevin dynamics (Song & Ermon 2019, arXiv:1907.05600, alg. 1) have the
    same proportion.
    """
    return score.new_full((), 2 * level.alpha * (snr * level.sigma) ** 2)


CORRECTORS: dict[str, Callable[[Tensor, Tensor, Level, float], Tensor]] = {
    "langevin": langevin,
    "annealed-langevin": annealed,
}


@torch.no_grad()
def annealed_langevin(
    score: Score,
    sigmas: Sequence[float] | Tensor,
    x: Tensor,
    steps_each: int = 100,
    step: float = 2e-5,
    *,
    denoise: bool = True,
    generator: torch.Generator | None = None,
    check_finite: bool = False,
    progress: bool | str = True,
) -> Tensor:
    """Annealed Langevin dynamics (Song & Ermon 2019, arXiv:1907.05600, alg. 1).

    At each level x <- x + (a / 2) score(x, sigma) + sqrt(a) z, with a = step (sigma / sigma_L)^2.

    Args:
        score: (x, sigma) -> grad log density of images with noise of deviation sigma, like x;
            sigma is float64 [N].
        sigmas: the L noise levels, decreasing.
        x: initial images, [N, ...], floating point, noise of about the first level.
        steps_each: number of steps at each level.
        step: the step size a at the last level.
        denoise: end with x + sigma_L^2 score(x, sigma_L), the mean of the clean image, in one more
            evaluation (Jolicoeur-Martineau et al. 2021, arXiv:2009.05475).
        generator: source of the noise, None for PyTorch's global generator.
        check_finite: check every score, which waits for the device.
        progress: show a progress bar on standard error; a string is its label.

    Returns:
        Images like ``x``.

    Raises:
        TypeError: ``x`` is not floating point, steps_each is no whole number, or a score is no
            tensor.
        ValueError: levels that do not decrease or are not positive; steps_each below 1, a step that
            is not positive, an ``x`` without dimensions beside N; a score of another shape than x.
        FloatingPointError: with ``check_finite``, the score is not finite.
    """
    check_images(x, "x")
    steps_each = check_count(steps_each, "steps_each")
    check_positive(step, "step")
    table = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach()
    if table.ndim != 1 or not table.numel():
        raise ValueError(f"sigmas must have shape [L] with L >= 1, got {tuple(table.shape)}")
    falling = bool((table.diff() < 0).all())
    if not (falling and bool(((table > 0) & table.isfinite()).all())):
        raise ValueError(f"sigmas must be positive and fall, got {table.tolist()}")
    evaluate = CheckedScore(score, x.dtype, check_finite)
    dtype, x = x.dtype, x.to(wide_dtype(x.dtype))
    levels, on_device = table.tolist(), table.to(x.device)
    for i in with_progress(len(levels) * steps_each, progress):
        level = i // steps_each
        size = step * (levels[level] / levels[-1]) ** 2
        gradient = evaluate(x, on_device[level], f"step {i}")
        x = x + (size / 2) * gradient + size**0.5 * normal(x, generator)
    if denoise:
        x = x + levels[-1] ** 2 * evaluate(x, on_device[-1], "the last denoising step")
    return x.to(dtype)
