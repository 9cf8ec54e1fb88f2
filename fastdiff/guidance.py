"""Guidance beyond a constant scale: classifiers and other energies, intervals, and CFG++.

``fastdiff.sample(guidance=)`` applies classifier-free guidance, inside the fused step. It takes one
scale per step: :func:`interval` and :func:`cfg_plus_plus` compute such scales. Guidance by the
gradient of another network wraps the model instead, see :func:`classifier_guided`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.common.checks import beside, wide_dtype
from fastdiff.process import conversion, conversion_at
from fastdiff.samplers import Sampler, Table
from fastdiff.samplers.grids import SAME_LEVEL_RTOL
from fastdiff.sampling.arguments import begin_at
from fastdiff.schedules import GaussianPath
from fastdiff.sde.discretization import DiscretizedSDE

LogProb = Callable[..., Tensor]  # (x [N, ...], t [N], **cond) -> [N]


def interval(
    sampler: Sampler | Table, scale: float, sigma_min: float, sigma_max: float = math.inf
) -> list[float]:
    """Classifier-free guidance at some noise levels only (Kynkäänniemi et al. 2024, eq. 5).

    arXiv:2404.07724: at high noise guidance costs variety, at low noise it does nothing.

    Args:
        sampler: the sampler that the scales are for.
        scale: guidance of the steps that begin with sigma / alpha in the interval; it is 1 for
            other steps.
        sigma_min: lower end of the interval, excluded.
        sigma_max: upper end of the interval, included.

    Returns:
        One scale per step, for ``fastdiff.sample(guidance=)``.

    Raises:
        ValueError: not 0 <= sigma_min < sigma_max.
    """
    if not 0 <= sigma_min < sigma_max:
        raise ValueError(f"wanted 0 <= sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    table, _ = begin_at(sampler, 0)
    begins = [True, *table.ends_step[:-1]]
    alpha, sigma = table.levels[:-1][begins].unbind(1)
    alpha = alpha * (1 + SAME_LEVEL_RTOL)  # rounding must not move a level across an end
    inside = (sigma > sigma_min * alpha) & (sigma <= sigma_max * alpha)
    return [scale if here else 1.0 for here in inside.tolist()]


def cfg_plus_plus(sampler: Sampler | Table, strength: float) -> list[float]:
    """CFG++ with DDIM (Chung et al. 2024, arXiv:2406.08070, algorithm 2).

    CFG++ guides x_0 and adds the unconditional noise back. Both are linear in the difference of the
    two predictions, so it equals classifier-free guidance with another scale in each step.

    Args:
        sampler: DDIM without noise (eta = 0) and without clipping.
        strength: lambda of the paper, 0..1.

    Returns:
        One scale per step, for ``fastdiff.sample(guidance=)``.

    Raises:
        ValueError: another sampler, or a strength outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in 0..1, got {strength}")
    table, _ = begin_at(sampler, 0)
    clips = (table.column("clip_min") > -math.inf) | (table.column("quantile") > 0)
    if table.name != "ddim" or any(table.noisy) or bool(clips.any()):
        raise ValueError(
            f"cfg_plus_plus is for 'ddim' without noise and clipping, got {table.name!r}"
            f"{', with noise' if any(table.noisy) else ''}{', clipped' if clips.any() else ''}"
        )
    x0_m = table.column("x0_m")
    of_prediction = table.column("out_x0") * x0_m + table.column("out_m")
    scales = strength * table.levels[1:, 0] * x0_m / of_prediction
    return [float(value) for value in scales]


def classifier_guided(
    model: Callable[..., Tensor],
    log_prob: LogProb,
    schedule: GaussianPath,
    *,
    kind: str = "eps",
    scale: float = 1.0,
    arguments: Sequence[str] = (),
) -> Callable[..., Tensor]:
    """A model whose samples follow p(x) p(y | x)^scale (Dhariwal & Nichol 2021, sec. 4).

    arXiv:2105.05233. Works for every kind of prediction and for every sampler: predictions are
    linear in the score, to which scale * grad log p(y | x_t) is added. At a timestep without
    signal, where x_t does not depend on y, the prediction is not changed.

    Two things differ from the authors' guided-diffusion. For DDPM's steps, its ``condition_mean``
    adds variance * scale * gradient to the posterior's mean, where variance is beta_tilde_t for a
    fixed small variance. Here the factor is beta_t / sqrt(1 - beta_t), with which the score enters
    that mean, so that samples follow the density above more closely. And guided-diffusion clips the
    predicted x0 before guidance, but a sampler's ``clip`` clips it after guidance.

    Args:
        model: ``(x, t, **cond)`` -> the prediction, like x; or with a learned variance [N, 2 C,
            ...], whose second half is not changed.
        log_prob: ``(x, t, **chosen)`` -> [N], the log-probability of the condition y, or minus any
            differentiable energy. It should be trained on noised x_t. See :func:`log_prob_of`.
        schedule: the noise schedule that both ``model`` and ``log_prob`` were trained on.
        kind: what the model predicts, one of ``process.KINDS``.
        scale: factor of the gradient.
        arguments: names of the keyword arguments in ``cond`` that go to ``log_prob`` (``chosen``)
            instead of the model.

    Returns:
        A model ``(x, t, **cond)`` for ``fastdiff.sample``.

    Raises:
        ValueError: an unknown kind, or a scale that is not finite. When called: log_prob returns
            another shape than [N], or has no gradient.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    _, of_score = conversion(schedule, "score", kind)  # [T]
    of_score = torch.where(schedule.alpha_t > 0, of_score, 0.0)
    factor = partial(_factor, schedule, kind, scale, of_score)
    return partial(_guided, model, log_prob, factor, tuple(arguments))


def _factor(
    schedule: GaussianPath, kind: str, scale: float, of_score: Tensor, t: Tensor, x: Tensor
) -> Tensor:
    """The factor of the gradient at the model's times t [N], to broadcast with x."""
    if isinstance(schedule, DiscretizedSDE):  # its timesteps may lie beyond 0..T-1
        levels = schedule.sde.levels(schedule.time(t))
        return scale * beside(conversion_at("score", kind, *levels)[1], x)
    return scale * _at(of_score, schedule.timestep(t.double()), x)


def _guided(
    model: Callable[..., Tensor],
    log_prob: LogProb,
    factor_at: Callable[[Tensor, Tensor], Tensor],
    arguments: Sequence[str],
    x: Tensor,
    t: Tensor,
    **cond: Any,
) -> Tensor:
    """The model's prediction plus the factor at t times the gradient of ``log_prob``."""
    chosen = {name: cond.pop(name) for name in arguments if name in cond}
    prediction = model(x, t, **cond)
    gradient = gradient_of(log_prob, x, t, **chosen)
    factor = factor_at(t, x)
    mean, *values = prediction.split(x.shape[1], dim=1)
    mean = torch.addcmul(mean, factor, gradient.to(factor.dtype)).to(x.dtype)
    return torch.cat([mean, *values], dim=1) if values else mean


def guided_score(
    score: Callable[[Tensor, Tensor], Tensor], log_prob: LogProb, scale: float = 1.0, **cond: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    """The score of p(x) p(y | x)^scale in continuous time (Song et al. 2021, eq. 14).

    arXiv:2011.13456.

    Args:
        score: (x [N, ...], t [N]) -> grad log p_t(x), like x.
        log_prob: (x, t, **cond) -> log p_t(y | x), [N], differentiable in x.
        scale: factor of the gradient of ``log_prob``.
        cond: keyword arguments of ``log_prob``.

    Raises:
        ValueError: a scale that is not finite. When called: the errors of :func:`gradient_of`.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return partial(_guided_score, score, log_prob, scale, cond)


def _guided_score(
    score: Callable[[Tensor, Tensor], Tensor],
    log_prob: LogProb,
    scale: float,
    cond: dict[str, Any],
    x: Tensor,
    t: Tensor,
) -> Tensor:
    return score(x, t) + scale * gradient_of(log_prob, x, t, **cond)


def log_prob_of(classifier: Callable[[Tensor, Tensor], Tensor]) -> LogProb:
    """log p(label | x_t) of a classifier ``(x, t)`` -> logits [N, K], as a ``log_prob``.

    The result takes the keyword argument ``labels``, int64 [N]: pass ``arguments=("labels",)`` to
    :func:`classifier_guided`.
    """
    return partial(_log_prob_of_labels, classifier)


def _log_prob_of_labels(
    classifier: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, labels: Tensor
) -> Tensor:
    logits = classifier(x, t)
    if logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        raise ValueError(
            f"the classifier must return logits [{x.shape[0]}, classes], "
            f"got shape {tuple(logits.shape)}"
        )
    return -functional.cross_entropy(logits.float(), labels, reduction="none")


def gradient_of(log_prob: LogProb, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """The gradient of log_prob(x, t) in x, like x.

    Raises:
        ValueError: log_prob returns another shape than [N], or nothing that depends on x.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = log_prob(x, t, **cond)
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"log_prob must return shape ({x.shape[0]},), got {given}")
        if not value.requires_grad:
            raise ValueError("log_prob has no gradient: what it returns does not depend on x")
        (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    if gradient is None:
        raise ValueError("log_prob has no gradient: what it returns does not depend on x")
    return gradient


def _at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """A table [T] at timesteps [N], interpolated between them, to broadcast with x."""
    table = table.to(x.device, wide_dtype(x.dtype))
    place = t.to(table.dtype).clamp(0, table.numel() - 1)
    below = place.floor().long()
    values = torch.lerp(
        table[below], table[(below + 1).clamp(max=table.numel() - 1)], place - below
    )
    return beside(values, x)
