"""DDIM and its inversion (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import Row, Sampler, check_share, pairs
from fastdiff.schedules import GaussianPath


class DDIM(Sampler):
    """x' = sqrt(abar') x0 + sqrt(1 - abar' - sigma^2) eps + sigma z (arXiv:2010.02502, eq. 12).

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, 1..T.
        eta: sigma as a fraction of DDPM's sigma (eq. 16), in [0, 1]; 0 is deterministic.
        use_clipped_model_output: recompute eps from the clipped x0, so that the two agree, as
            OpenAI's code does (diffusers' default is False). No effect if nothing is clipped.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; eta outside [0, 1].
    """

    name = "ddim"
    default_grid = "leading"
    default_clip = (-1.0, 1.0)

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 50,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool = True,
        **options: Any,
    ) -> None:
        check_share("eta", eta)
        self.eta, self.use_clipped_model_output = eta, use_clipped_model_output
        super().__init__(schedule, steps, **options)

    @property
    def _eps_follows_x0(self) -> bool:
        return self.use_clipped_model_output and super()._eps_follows_x0

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """Predict x0 and eps at s, and combine them to x at t."""
        for i, s, t in pairs(points):
            beta = max(s.sigma**2 - (s.alpha / t.alpha * t.sigma) ** 2, 0.0)
            sigma = self.eta * t.sigma / s.sigma * math.sqrt(beta)
            eps = math.sqrt(max(t.sigma**2 - sigma**2, 0.0))
            yield Row(i, s, x0=t.alpha, eps=eps, noise=sigma)


class DDIMInverse(Sampler):
    """DDIM inversion: DDIM's steps backwards, from an image to the noise that leads to it.

    Song et al. 2021, arXiv:2010.02502, section 4.3. The step from s to the noisier t needs eps at
    t, but x at t is not known yet: as usual, the model is given x at s with the time of t. Pass the
    image as x_T.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, 1..T.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`.
    """

    name = "ddim-inverse"
    default_grid = "leading"

    def __init__(self, schedule: GaussianPath, steps: int = 50, **options: Any) -> None:
        super().__init__(schedule, steps, **options)

    def _points(self, *arguments: Any) -> list[Point]:
        return super()._points(*arguments)[::-1]

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """From the image (alpha = 1, sigma = 0) upwards."""
        for i, s, t in pairs(points):
            grows = t.alpha / s.alpha
            yield Row(i, t, x=grows, eps=t.sigma - grows * s.sigma, level=(s.alpha, s.sigma))
