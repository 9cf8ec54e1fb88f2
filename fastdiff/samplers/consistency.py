"""Sampling from consistency models and latent consistency models, in one step or several."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.grids import Point, point_at_time
from fastdiff.samplers.sampler import Row, Sampler, check_amounts, pairs
from fastdiff.schedules import GaussianPath


class Consistency(Sampler):
    """Jump to the image, add noise for the next level, jump again (arXiv:2303.01469, algorithm 1).

    A jump leads to the image f(x, t), f being the consistency function. With r = sigma / alpha and
    r_min the smallest level on which f is defined, x' = alpha' (f + sqrt(r'^2 - r_min^2) z).

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: jumps to take.
        sigma_data: the images' standard deviation s, for a model whose output F gives
            f = c_skip x / alpha + c_out F with c_skip = s^2 / ((r - r_min)^2 + s^2) and
            c_out = s (r - r_min) / sqrt(r^2 + s^2) (appendix C). None for a model whose
            ``prediction`` is converted to f as for other samplers.
        s_noise: standard deviation of the noise added.
        **options: see :class:`fastdiff.samplers.Sampler`; ``prediction`` is x0 if not given.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; sigma_data that is not positive, or
            beside another prediction than x0; negative s_noise.
    """

    name = "consistency"

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 1,
        *,
        sigma_data: float | None = None,
        s_noise: float = 1.0,
        prediction: str = "x0",
        **options: Any,
    ) -> None:
        if sigma_data is not None and not (sigma_data > 0 and prediction == "x0"):
            raise ValueError(
                "sigma_data must be positive and goes with a prediction of x0, "
                f"got {sigma_data} and {prediction}"
            )
        check_amounts(s_noise=s_noise)
        self.sigma_data, self.s_noise = sigma_data, s_noise
        self.r_min = options.get("sigma_min") or point_at_time(schedule, 0).ratio
        super().__init__(schedule, steps, prediction=prediction, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """Every row's x is a sum of the row's predicted image and fresh noise."""
        for i, s, t in pairs(points):
            form = None
            if self.sigma_data is not None:
                above = s.ratio - self.r_min
                skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
                out = self.sigma_data * above / math.sqrt(s.ratio**2 + self.sigma_data**2)
                form = (skip / s.alpha, out)
            noise = math.sqrt(max(t.ratio**2 - self.r_min**2, 0.0))
            yield Row(i, s, x0=t.alpha, noise=t.alpha * noise * self.s_noise, x0_form=form)


class LCM(Sampler):
    """Latent consistency models' sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

    x' = alpha' f + sigma' z with f = c_skip x + c_out x0, c_skip = s^2 / (u^2 + s^2),
    c_out = u / sqrt(u^2 + s^2), s = 0.5 and u = timestep_scaling t.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: jumps to take, at most ``original_steps``.
        original_steps: steps of the grid that the model was distilled on. The sampler visits every
            (original_steps / steps)-th of them. Ignored if ``grid`` is given.
        timestep_scaling: factor of t in u; larger values leave less of x in f. None takes f = x0,
            for models whose own prediction meets the boundary condition.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; without ``grid``, not
            1 <= steps <= original_steps <= T.
    """

    name = "lcm"

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 4,
        *,
        original_steps: int = 50,
        timestep_scaling: float | None = 10.0,
        grid: Any = None,
        **options: Any,
    ) -> None:
        if grid is None:
            total = schedule.num_timesteps
            if not 1 <= steps <= original_steps <= total:
                raise ValueError(
                    f"wanted 1 <= steps <= original_steps <= {total} (the schedule's T), "
                    f"got {steps} and {original_steps}"
                )
            stride = total // original_steps
            visited = [original_steps - i * original_steps // steps for i in range(steps)]
            grid = [float(k * stride - 1) for k in visited]
        self.timestep_scaling = timestep_scaling
        super().__init__(schedule, steps, grid=grid, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """Every row's x is a sum of f and fresh noise."""
        for i, s, t in pairs(points):
            skip, out = 0.0, 1.0
            if self.timestep_scaling is not None:
                u = self.timestep_scaling * s.t
                skip, out = 0.25 / (u**2 + 0.25), u / math.sqrt(u**2 + 0.25)
            yield Row(i, s, x=t.alpha * skip, x0=t.alpha * out, noise=t.sigma)
