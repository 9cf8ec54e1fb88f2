"""Sampling with self-conditioning: the last estimate of x0 is carried from call to call.

Chen et al. 2022, arXiv:2208.04202, section 3.2 and algorithm 2. Every evaluation of the network
makes an estimate, and the next one is given it, whatever steps it belongs to. Under classifier-free
guidance the two halves of a batch have estimates of their own, since in training an estimate was
that of the same label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.common.estimates import limited
from fastdiff.common.model import Model, tensor_of
from fastdiff.guidance.levels import levels_at
from fastdiff.process import conversion_at, linear, x0_and_eps
from fastdiff.schedules import GaussianPath
from fastdiff.sde import SDE, Score


def self_conditioned(model: Model, path: GaussianPath, *, kind: str = "eps") -> nn.Module:
    """A self-conditioned model for ``fastdiff.sample``, which carries its estimates.

    ``Diffusion(self_condition=True)`` and checkpoints of such models sample so by themselves. The
    result is called by ``mode="eager"`` alone, since a captured graph or a compiled step would
    not carry what a call keeps.

    Args:
        model: (x, t, *, estimate, **cond) -> the prediction [N, C, ...]; or with a learned variance
            [N, 2 C, ...].
        path: the schedule that the model was trained on, and the sampler was made for.
        kind: what the model predicts, one of ``process.KINDS``.

    Returns:
        A model (x, t, **cond) -> the prediction.

    Example:
        >>> model = guidance.self_conditioned(network, schedule, kind="v")
        >>> images = fastdiff.sample(model, sampler, (16, 3, 32, 32))
    """
    return _SelfConditioned(model, path, kind)


class _SelfConditioned(nn.Module):
    """The model of :func:`self_conditioned`, a ``common.model.KeepsValues``."""

    def __init__(self, model: Model, path: GaussianPath, kind: str) -> None:
        super().__init__()
        self.model, self.path, self.kind = model, path, kind
        self.estimate: Tensor | None = None
        self.train(model.training if isinstance(model, nn.Module) else False)

    def begin_sampling(self) -> None:
        """Begin with zeros."""
        self.estimate = None

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        estimate = torch.zeros_like(x) if self.estimate is None else self.estimate
        output = tensor_of(self.model(x, t, **cond, estimate=estimate))
        with torch.no_grad():
            to_x0, _ = x0_and_eps(self.kind, *levels_at(self.path, t.expand(x.shape[0])))
            x0 = linear(to_x0, x, output[:, : x.shape[1]])
            self.estimate = limited(x0).to(x.dtype)
        return output


class Estimates:
    """The last estimate of each image for a solver, whose images may leave the batch.

    Args:
        process: the SDE.
        rows: number of estimates: of the images, or twice that if a model is given each twice.
    """

    def __init__(self, process: SDE, rows: int) -> None:
        self._process, self._rows = process, rows
        self._kept: Tensor | None = None

    def carried(self, score_given: Callable[[Tensor], Score], places: Tensor) -> Score:
        """The score of images, which reads their estimates and replaces them.

        Args:
            score_given: an estimate [M, C, ...] -> the score with this estimate.
            places: of the M images among all, int64 [M].
        """

        def score(x: Tensor, t: Tensor) -> Tensor:
            if self._kept is None:
                self._kept = x.new_zeros(self._rows, *x.shape[1:])
            found = score_given(self._kept[places])(x, t)
            with torch.no_grad():
                levels = self._process.levels(self._process.check_time(t, x))
                x0 = linear(conversion_at("score", "x0", *levels), x, found)
                self._kept[places] = limited(x0).to(x.dtype)
            return found

        return score
