"""Inverse problems: images of which y = A x0 + noise was measured, with A linear.

The likelihood of y given x_t is not known. Both methods take it at the x0 that the model predicts,
with its gradient through the network: one forward and one backward pass an evaluation.

    posterior_sampling    the gradient of |y - A x0| is subtracted after each step
    pseudoinverse_guided  the gradient of a Gaussian log-likelihood, that allows for the spread of
                          x0 given x_t, is added to the score

What keeps a known part as it is, and noises it, is ``fastdiff.sample(mask=)`` and, in continuous
time, ``fastdiff.sde.solve(known=)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.common.checks import beside, check_shape
from fastdiff.common.model import Model, tensor_of
from fastdiff.guidance.levels import Levels, levels_at
from fastdiff.guidance.mean_shift import check_unclipped, row_at, shifted
from fastdiff.process import check_kind, conversion_at, linear, x0_and_eps
from fastdiff.samplers import Sampler
from fastdiff.schedules import GaussianPath
from fastdiff.sde import SDE


@dataclass(frozen=True)
class Measured:
    """A linear operator A whose rows are orthogonal and equally long: A A^T = gain I.

    Attributes:
        apply: A, images [N, C, ...] -> what is measured, [N, ...].
        gain: the squared length of a row.
    """

    apply: Callable[[Tensor], Tensor]
    gain: float = 1.0


def pixels(mask: Tensor) -> Measured:
    """The pixels where ``mask`` is 0, and 0 elsewhere, as ``fastdiff.sample`` takes a mask."""
    return Measured(lambda x: (1 - mask.to(x.device, x.dtype)) * x)


def grey(channels: int = 3) -> Measured:
    """The mean of the channels of images [N, C, ...], to be coloured."""
    return Measured(lambda x: x.mean(1, keepdim=True), 1 / channels)


def smaller(factor: int) -> Measured:
    """Means of squares of factor x factor pixels, to be enlarged."""
    return Measured(lambda x: F.avg_pool2d(x, factor), 1 / factor**2)


def posterior_sampling(
    model: Model, measured: Measured, y: Tensor, sampler: Sampler, *, scale: float = 1.0
) -> Callable[..., Tensor]:
    """Diffusion posterior sampling (Chung et al. 2023, arXiv:2209.14687, algorithm 1).

    After each step x moves by -scale times the gradient of |y - A x0|, x0 being predicted from x
    before the step. Any differentiable ``measured.apply`` will do, linear or not.

    Args:
        model: ``(x, t, **cond)`` -> the prediction [N, C, ...], or with a learned variance.
        measured: the operator.
        y: what was measured, of the shape of its result.
        sampler: the sampler that the result is for: one that keeps nothing between steps, such as
            ddpm (the paper's) or ddim, made with ``clip=None``. To clip the predicted x0, wrap the
            model by ``guidance.denoised``.
        scale: zeta of the paper, 0.3 to 1 there.

    Returns:
        A model ``(x, t, **cond)`` for ``fastdiff.sample``.

    Raises:
        ValueError: a sampler that clips or keeps values, or a scale that is not finite. When
            called: y has another shape, or a time is not the sampler's.
    """
    table, kind = sampler.table, sampler.prediction
    check_unclipped(table)
    if table.depth:
        raise ValueError(f"{table.name} keeps values between steps: take ddpm, ddim or euler")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    levels = partial(levels_at, sampler.schedule)

    def distance(x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return -scale * (y.to(x0) - _checked(measured, x0, y)).flatten(1).norm(dim=1)

    def guided(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        prediction, values, gradient, _ = _gradient(model, kind, levels, distance, x, t, cond)
        return shifted(table, row_at(table, t), x, prediction, gradient, values)

    return guided


def pseudoinverse_guided(
    model: Model,
    measured: Measured,
    y: Tensor,
    process: GaussianPath | SDE,
    *,
    kind: str = "eps",
    noise: float = 0.0,
    data_std: float = 1.0,
    scale: float = 1.0,
) -> Callable[..., Tensor]:
    """Pseudoinverse guidance (Song et al. 2023, ICLR, "Pseudoinverse-guided diffusion models").

    Adds the gradient of log N(y; A x0, gain r^2 + noise^2) to the score (eq. 7 of the paper), where
    r^2 = sigma^2 s^2 / (alpha^2 s^2 + sigma^2) is the spread of x0 given x_t for data of deviation
    s. For Gaussian data of that deviation samples follow the posterior exactly. The update that the
    paper adds to DDIM's steps has a further factor, which a ``scale`` may stand for.

    Args:
        model: ``(x, t, **cond)`` -> the prediction [N, C, ...], or with a learned variance; for a
            solver of an SDE the score, with ``kind="score"``.
        measured: the operator.
        y: what was measured, of the shape of its result.
        process: the schedule that the model was trained on, or the SDE of the score.
        kind: what the model predicts, one of ``process.KINDS``.
        noise: standard deviation of the measurement's noise.
        data_std: s, in the paper 1; about 0.5 for images in [-1, 1].
        scale: factor of the gradient.

    Returns:
        A model ``(x, t, **cond)`` for ``fastdiff.sample``, or a score for ``fastdiff.sde.solve``.

    Raises:
        ValueError: an unknown kind, negative noise, a data_std that is not positive, or a scale
            that is not finite. When called: y has another shape.
    """
    check_kind(kind)
    if not 0 <= noise < math.inf or not 0 < data_std < math.inf or not math.isfinite(scale):
        raise ValueError(
            "wanted noise >= 0, data_std > 0 and a finite scale, "
            f"got {noise}, {data_std} and {scale}"
        )
    levels: Levels = process.levels if isinstance(process, SDE) else partial(levels_at, process)

    def log_likelihood(x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        residual = (y.to(x0) - _checked(measured, x0, y)).flatten(1).square().sum(1)
        spread = (sigma * data_std) ** 2 / ((alpha * data_std) ** 2 + sigma**2)
        return -residual / 2 / (measured.gain * spread + noise**2)

    def guided(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        prediction, values, gradient, (alpha, sigma) = _gradient(
            model, kind, levels, log_likelihood, x, t, cond
        )
        of_score = torch.where(alpha > 0, conversion_at("score", kind, alpha, sigma)[1], 0.0)
        moved = (prediction + scale * beside(of_score, x) * gradient).to(x.dtype)
        return torch.cat([moved, *values], dim=1) if values else moved

    return guided


def _gradient(
    model: Model,
    kind: str,
    levels: Levels,
    energy: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    cond: dict[str, Any],
) -> tuple[Tensor, list[Tensor], Tensor, tuple[Tensor, Tensor]]:
    """The prediction, the variance's channels, the energy's gradient in x, and alpha and sigma.

    Args:
        model: the model.
        kind: what it predicts.
        levels: alpha and sigma at times t.
        energy: (x0 [N, ...], alpha [N], sigma [N]) -> [N].
        x: images [N, C, ...].
        t: times [N].
        cond: arguments of the model.
    """
    alpha, sigma = levels(t.expand(x.shape[0]))
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        prediction, *values = tensor_of(model(x, t, **cond)).split(x.shape[1], dim=1)
        x0 = linear(x0_and_eps(kind, alpha, sigma)[0], x, prediction)
        (gradient,) = torch.autograd.grad(energy(x0, alpha, sigma).sum(), x)
    return prediction.detach(), [value.detach() for value in values], gradient, (alpha, sigma)


def _checked(measured: Measured, x0: Tensor, y: Tensor) -> Tensor:
    found = measured.apply(x0)
    check_shape(y, found, "y")
    return found
