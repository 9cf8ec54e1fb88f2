"""In which time and scaling of the images a step is straight (EDM, arXiv:2206.00364, table 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdiff.samplers.churn import Churned
from fastdiff.samplers.grids import Point, level_limits
from fastdiff.samplers.noise_times import EXPLODING, LINEAR, NoiseTime, preserving
from fastdiff.samplers.sampler import check_choice, check_ratios
from fastdiff.schedules import GaussianPath

NOISE_SCHEDULES = ("linear", "ve", "vp")
SCALINGS = ("none", "vp")


@dataclass(frozen=True)
class Coordinates:
    """x = s (x0 + sigma eps), the scaling s and the level sigma being functions of a time.

    The probability-flow ODE moves x along the curve s x0 + (s sigma) eps, and its solution does not
    depend on the coordinates. A step follows the curve's tangent, the derivative with x0 and eps
    held, so that its error does.

    Attributes:
        noise_time: sigma as a function of the time.
        scaled: s = 1 / sqrt(1 + sigma^2), the scaling of variance-preserving processes, not s = 1.
    """

    noise_time: NoiseTime
    scaled: bool

    @property
    def plain(self) -> bool:
        """Whether the curve is x0 + sigma eps, along which both are straight in sigma."""
        return self.noise_time == LINEAR and not self.scaled

    def scale(self, level: float) -> float:
        """s at a level sigma."""
        return (1 + level**2) ** -0.5 if self.scaled else 1.0

    def tangent(self, level: float) -> tuple[float, float]:
        """The derivatives of s and of s sigma in the time, at a level sigma."""
        slope, s = self.noise_time.slope(level), self.scale(level)
        return (-level * slope * s**3, slope * s**3) if self.scaled else (0.0, slope)

    def duration(self, start: float, end: float) -> float:
        """The time from one level to another."""
        return self.noise_time.time(end) - self.noise_time.time(start)

    def inside(self, start: float, end: float, share: float) -> float:
        """The level at a share of the time from one level to another."""
        if share == 1:  # not rounded
            return end
        time = self.noise_time.time(start) + share * self.duration(start, end)
        return self.noise_time.level(time)

    def moved(self, start: float, end: float, share: float = 1.0) -> tuple[float, float]:
        """x0's and eps's factors in x after a share of the time, along the tangent at ``start``."""
        if self.plain and share == 1:  # also from an infinite level
            return 1.0, end
        (x0, eps), h, s = self.tangent(start), self.duration(start, end), self.scale(start)
        return s + share * h * x0, s * start + share * h * eps


class Straight(Churned):
    """Methods whose steps are straight in the coordinates of the options (EDM, table 1).

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        noise_schedule: sigma / alpha as a function of the time in which steps are straight: t is
            "linear", sqrt(t) is "ve", and "vp" is that of the variance-preserving process from
            sigma_min at time 0.001 to sigma_max at time 1.
        scaling: what images are multiplied by: "none", or with "vp" 1 / sqrt(1 + sigma^2). Both
            options say how steps are taken and not what the model was trained on.
        **options: see :class:`fastdiff.samplers.churn.Churned`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.churn.Churned`; an unknown noise_schedule or
            scaling; zero terminal SNR, unless both are the default.
    """

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 50,
        *,
        noise_schedule: str = "linear",
        scaling: str = "none",
        **options: Any,
    ) -> None:
        check_choice("noise_schedule", noise_schedule, NOISE_SCHEDULES)
        check_choice("scaling", scaling, SCALINGS)
        self.noise_schedule, self.scaling = noise_schedule, scaling
        super().__init__(schedule, steps, **options)

    def _points(
        self, schedule: GaussianPath, steps: int, grid: Any, options: dict[str, Any]
    ) -> list[Point]:
        points = super()._points(schedule, steps, grid, options)
        noise_time = LINEAR
        if self.noise_schedule == "ve":
            noise_time = EXPLODING
        elif self.noise_schedule == "vp":
            noise_time = preserving(
                *level_limits(
                    schedule,
                    "noise schedule vp",
                    options.get("sigma_min"),
                    options.get("sigma_max"),
                )
            )
        self.coordinates = Coordinates(noise_time, self.scaling == "vp")
        if not self.coordinates.plain:
            check_ratios(self.name, points)
        return points
