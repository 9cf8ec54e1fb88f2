"""Guidance by the gradient of a classifier's log-probability, or of any other energy."""

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
from fastdiff.schedules import GaussianPath
from fastdiff.sde.discretization import DiscretizedSDE

LogProb = Callable[..., Tensor]  # (x [N, ...], t [N], **cond) -> [N]


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

    In DDPM's steps the factor of the gradient is then beta_t / sqrt(1 - beta_t), with which the
    score enters the posterior's mean. The authors' guided-diffusion takes the step's variance
    instead, as :func:`fastdiff.guidance.condition_mean` does. It also clips the predicted x0 before
    guidance, for which there is :func:`fastdiff.guidance.denoised`: a sampler's ``clip`` clips it
    after guidance.

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
