"""Guidance away from a weaker model: autoguidance, and adaptive projected guidance.

The weaker model may be another network (Karras et al. 2024, arXiv:2406.02507), the same network
without its condition (Ho & Salimans 2022, arXiv:2207.12598), or the same network with perturbed
attention (``fastdiff.guidance.perturbed``). A rule says how the two predictions are combined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.common.checks import beside, wide_dtype
from fastdiff.common.model import Model, tensor_of
from fastdiff.guidance.levels import Levels, levels_at
from fastdiff.process import check_kind, conversion_at, linear, x0_and_eps
from fastdiff.schedules import GaussianPath


class Rule(Protocol):
    """How a prediction and that of a weaker model become one.

    Attributes:
        of_x0: whether the predictions must be those of x0; else they may be of any kind, which is
            right for a linear rule alone.
        momentum: the share of earlier differences in the one that is used.
    """

    @property
    def of_x0(self) -> bool:
        """Whether the predictions must be those of x0."""

    @property
    def momentum(self) -> float:
        """The factor of the differences that were kept; 0 keeps none."""

    def __call__(self, prediction: Tensor, difference: Tensor) -> Tensor:
        """The guided prediction, from a prediction and what it is more than the weaker one."""


class Linear:
    """weaker + scale (prediction - weaker), as in classifier-free guidance and autoguidance.

    Args:
        scale: 1 leaves the prediction as it is.

    Raises:
        ValueError: a scale that is not finite.
    """

    of_x0, momentum = False, 0.0

    def __init__(self, scale: float) -> None:
        self.scale = _finite(scale, "scale")

    def __call__(self, prediction: Tensor, difference: Tensor) -> Tensor:
        """The guided prediction."""
        return prediction + (self.scale - 1) * difference


class Projected:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416, algorithm 1).

    Of the difference of the two x0 the part along x0 itself, which saturates images, counts less,
    long differences are shortened, and differences of earlier steps are subtracted.

    Args:
        scale: as of :class:`Linear`, to which this comes down with the values eta = 1, no norm and
            no momentum.
        eta: share that is left of the difference's part along x0.
        norm: longest difference of an image, in the Euclidean norm; None for any. It grows with the
            root of the number of values: the paper has 2.5 for 4x64x64 latents of EDM2.
        momentum: factor of the running sum of differences that is added to each; the paper's are
            negative, -0.5 or -0.75.

    Raises:
        ValueError: values that are not finite, a norm that is not positive, or a momentum outside
            -1..1.
    """

    of_x0 = True

    def __init__(
        self, scale: float, *, eta: float = 0.0, norm: float | None = None, momentum: float = 0.0
    ) -> None:
        self.scale, self.eta = _finite(scale, "scale"), _finite(eta, "eta")
        if norm is not None and not 0 < norm < math.inf:
            raise ValueError(f"norm must be positive, got {norm}")
        if not -1 < momentum < 1:
            raise ValueError(f"momentum must lie between -1 and 1, got {momentum}")
        self.norm, self.momentum = norm, momentum

    def __call__(self, prediction: Tensor, difference: Tensor) -> Tensor:
        """The guided x0, from x0 and the difference, float32 or float64 [N, ...]."""
        x0, update = prediction.flatten(1).double(), difference.flatten(1).double()
        if self.norm is not None:
            length = update.norm(dim=1, keepdim=True)
            update = update * (self.norm / length.clamp(min=self.norm))
        power = x0.square().sum(1, keepdim=True)
        along = (update * x0).sum(1, keepdim=True) / torch.where(power > 0, power, 1.0) * x0
        guided = x0 + (self.scale - 1) * (update + (self.eta - 1) * along)
        return guided.view_as(prediction).to(prediction.dtype)


def autoguided(model: Model, weaker: Model, scale: float) -> nn.Module:
    """A model guided by a weaker one (Karras et al. 2024, arXiv:2406.02507, eq. 3).

    A network that was trained less, or is smaller, errs where the better one errs, but more. So
    away from it lies what is better, without the loss of variety of classifier-free guidance.

    Args:
        model: ``(x, t, **cond)`` -> the prediction; a learned variance is not changed.
        weaker: a model of the same process, time and kind of prediction, that takes the same
            arguments.
        scale: weaker + scale (model - weaker); 1 leaves the model as it is.

    Returns:
        A model ``(x, t, *, without=None, **cond)``; ``without`` is a dict of arguments that only
        the weaker model is given, in place of those of the same name.

    Raises:
        ValueError: a scale that is not finite.
    """
    return contrasted(model, weaker, Linear(scale), None, "eps")


def adaptive_projected(
    model: Model,
    path: GaussianPath,
    *,
    scale: float,
    kind: str = "eps",
    weaker: Model | None = None,
    **options: Any,
) -> nn.Module:
    """A model under adaptive projected guidance, see :class:`Projected`.

    Args:
        model: ``(x, t, **cond)`` -> the prediction; a learned variance is not changed.
        path: the schedule that the model was trained on.
        scale: of the guidance; 1 leaves the model as it is.
        kind: what the model predicts, one of ``process.KINDS``.
        weaker: the model that is guided away from; None for ``model`` with other arguments.
        options: eta, norm and momentum of :class:`Projected`.

    Returns:
        A model as of :func:`autoguided`. Where there is no ``weaker``, pass the arguments without
        the condition: ``cond={"class_labels": labels, "without": {"class_labels": nothing}}``.

    Raises:
        TypeError, ValueError: an unknown option or kind, or a value out of range.

    Example:
        >>> guided = guidance.adaptive_projected(model, schedule, scale=4.0, kind="v", norm=5.0)
        >>> images = fastdiff.sample(guided, sampler, shape, cond=cond)
    """
    return guided_by_contrast(model, path, Projected(scale, **options), kind=kind, weaker=weaker)


def guided_by_contrast(
    model: Model, path: GaussianPath, rule: Rule, *, kind: str = "eps", weaker: Model | None = None
) -> nn.Module:
    """A model guided by a rule of one's own: see :class:`Rule` and :func:`adaptive_projected`."""
    weaker = model if weaker is None else weaker
    return contrasted(model, weaker, rule, partial(levels_at, path), kind)


def contrasted(
    model: Model, weaker: Model, rule: Rule, levels: Levels | None, kind: str
) -> nn.Module:
    """A model combined with a weaker one by a rule.

    Args:
        model: (x, t, **cond) -> prediction.
        weaker: likewise.
        rule: how their predictions are combined.
        levels: alpha and sigma at times t; None if the rule does not need x0.
        kind: what both predict.
    """
    check_kind(kind)
    kind_of_model = _WithMomentum if rule.momentum else _Contrasted
    return kind_of_model(model, weaker, rule, levels, kind)


class _Contrasted(nn.Module):
    """The model of :func:`contrasted`."""

    def __init__(
        self, model: Model, weaker: Model, rule: Rule, levels: Levels | None, kind: str
    ) -> None:
        super().__init__()
        self.model, self.weaker, self.rule = model, weaker, rule
        self.levels, self.kind = levels, kind
        self.train(model.training if isinstance(model, nn.Module) else False)

    def forward(
        self, x: Tensor, t: Tensor, *, without: Mapping[str, Any] | None = None, **cond: Any
    ) -> Tensor:
        channels = x.shape[1]
        own, *values = tensor_of(self.model(x, t, **cond)).split(channels, dim=1)
        other = tensor_of(self.weaker(x, t, **{**cond, **(without or {})}))[:, :channels]
        guided = self._combined(own, other, x, t).to(x.dtype)
        return torch.cat([guided, *values], dim=1) if values else guided

    def _combined(self, own: Tensor, other: Tensor, x: Tensor, t: Tensor) -> Tensor:
        difference = own.to(wide_dtype(x.dtype)) - other
        if not self.rule.of_x0:
            return self.rule(own, self._used(difference))
        assert self.levels is not None
        levels = self.levels(t.expand(x.shape[0]))
        to_x0, _ = x0_and_eps(self.kind, *levels)
        guided = self.rule(linear(to_x0, x, own), self._used(beside(to_x0[1], x) * difference))
        return linear(conversion_at("x0", self.kind, *levels), x, guided)

    def _used(self, difference: Tensor) -> Tensor:
        """The difference that the rule gets."""
        return difference


class _WithMomentum(_Contrasted):
    """Differences are summed up over a run; see ``common.model.KeepsValues``."""

    kept: Tensor | None = None

    def begin_sampling(self) -> None:
        """Forget the differences of an earlier run."""
        self.kept = None

    def _used(self, difference: Tensor) -> Tensor:
        if self.kept is not None:
            difference = difference + self.rule.momentum * self.kept
        self.kept = difference
        return difference


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value
