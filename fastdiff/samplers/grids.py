"""The noise levels that a sampler visits.

A grid is a list of points from noise to image: S + 1 points for a sampler of S steps. The model is
evaluated at the first S points, and the sampler ends at the last.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastdiff import schedules
from fastdiff.samplers.noise_times import VP_SMALLEST, preserving
from fastdiff.schedules import GaussianPath

FINALS = ("zero", "sigma_min")  # choices for ``final`` of ``make``
IDDPM_TIMESTEPS = 1000  # of the models of Nichol & Dhariwal 2021, arXiv:2102.09672
SAME_LEVEL_RTOL = 1e-12  # relative difference of sigma / alpha within which two levels are equal
# Keyword arguments of ``make``.
OPTIONS = ("offset", "final", "rho", "sigma_min", "sigma_max", "round_levels")


@dataclass(frozen=True)
class Point:
    """One level x = alpha x0 + sigma eps, and its timestep.

    Attributes:
        t: the timestep, in 0..T-1 unless the path extends, fractions allowed; -1 at zero noise. The
            path's ``label`` gives the model's time for it.
        alpha: coefficient of the image.
        sigma: coefficient of the noise.
    """

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level of the unscaled image (EDM's sigma)."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def lam(self) -> float:
        """lambda = log(alpha / sigma), half the log-SNR; infinite if alpha or sigma is 0."""
        if self.alpha <= 0 or self.sigma <= 0:
            return math.inf if self.alpha > 0 else -math.inf
        return math.log(self.alpha / self.sigma)


def point_at_time(path: GaussianPath, t: float) -> Point:
    """The point of a path at t; between timesteps log(sigma / alpha) is linear in t."""
    low = min(int(t), path.num_timesteps - 1)
    share = t - low
    if share == 0:
        return Point(float(t), path.alpha_t[low].item(), path.sigma_t[low].item())
    if path.alpha_t[low + 1] == 0:  # the logarithm is infinite: interpolate the angle instead
        angle = torch.atan2(path.sigma_t[low : low + 2], path.alpha_t[low : low + 2])
        ratio = torch.tan(angle[0] + share * (angle[1] - angle[0]))
    else:
        lam = path.lambda_t[low : low + 2]
        ratio = torch.exp(-(lam[0] + share * (lam[1] - lam[0])))
    alpha, sigma = path.levels(ratio)
    return Point(float(t), alpha.item(), sigma.item())


def point_at_ratio(path: GaussianPath, ratio: float) -> Point:
    """The point of a path where sigma / alpha is ``ratio``: the inverse of :func:`point_at_time`.

    Beyond the path's ends t is clamped to 0..T-1, unless the path extends: then log(sigma / alpha)
    is extrapolated from the two timesteps next to the end.
    """
    lam = -math.log(ratio)
    table = path.lambda_t  # falls with t
    last = table.numel() - 1
    low = min(max(int((table > lam).sum()) - 1, 0), max(last - 1, 0))
    if last == 0:
        t = 0.0
    elif path.alpha_t[low + 1] == 0:
        angle = torch.atan2(path.sigma_t[low : low + 2], path.alpha_t[low : low + 2])
        t = low + ((math.atan(ratio) - angle[0]) / (angle[1] - angle[0])).item()
    else:
        t = low + ((table[low] - lam) / (table[low] - table[low + 1])).item()
    if not path.extends:
        t = min(max(t, 0.0), float(last))
    alpha, sigma = path.levels(torch.tensor(ratio, dtype=torch.float64, device="cpu"))
    return Point(t, alpha.item(), sigma.item())


def nearest_timestep(path: GaussianPath, ratio: float) -> Point:
    """The point of the timestep 0..T-1 whose sigma / alpha is nearest to ``ratio``."""
    if math.isinf(ratio):
        return point_at_time(path, path.num_timesteps - 1)
    return point_at_time(path, int((path.sigma_t / path.alpha_t - ratio).abs().argmin()))


def make(
    path: GaussianPath,
    steps: int,
    grid: str | Sequence[float] | Tensor,
    *,
    offset: int = 0,
    final: str = "zero",
    rho: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    round_levels: bool = False,
) -> list[Point]:
    """The S + 1 points of a grid.

    Args:
        path: the noise schedule, T timesteps.
        steps: S, at least 1; at most T for grids of whole timesteps.
        grid: a name, or the S timesteps themselves, decreasing, in 0..T-1, fractions allowed:

            leading      i (T // S) + offset                  (arXiv:2305.08891, table 2)
            trailing     round(T - i T / S) - 1
            linspace     round((T - 1) (1 - i / (S - 1)))
            uniform      (T - 1) (1 - i / S), not rounded
            quadratic    round((T - 1) (i / (S - 1))^2)       (DDIM, arXiv:2010.02502, appendix D.2)
            karras       sigma / alpha evenly spaced to the power 1 / rho    (EDM, arXiv:2206.00364,
                         eq. 5)
            exponential  log(sigma / alpha) evenly spaced; EDM's grid of VE
            vp           even in the time of the variance-preserving process with these limits
                         (EDM, table 1, column VP)
            iddpm        levels of the cosine schedule of 1000 timesteps within the limits, evenly
                         spaced in their numbers  (EDM, table 1, column iDDPM)
            polyexponential  log(sigma / alpha) falls with (1 - i / (S - 1))^rho  (k-diffusion)
            logsnr       log(sigma / alpha) evenly spaced, with sigma_min one step after the last
                         evaluation  (DPM-Solver, arXiv:2206.00927, section 3.3)

        offset: added to the timesteps of the leading grid (Stable Diffusion uses 1).
        final: where the grid ends: "zero" noise, or "sigma_min", which is the argument of that name
            or, if None, the level of timestep 0.
        rho: exponent of the karras grid, 7 if None, and of the polyexponential grid, 1 if None,
            which is the exponential grid.
        sigma_min: smallest sigma / alpha of the grids of sigma / alpha (all from karras on); None
            for the level of timestep 0. Below that level the model gets timestep 0, unless the path
            extends.
        sigma_max: largest sigma / alpha of these grids; None for the level of timestep T - 1. Above
            that level the model gets timestep T - 1, unless the path extends.
        round_levels: replace each level by that of the nearest of the path's timesteps, for
            networks that know no levels between those (EDM's ``round_sigma``). The model then gets
            whole timesteps only, also within a sampler's steps.

    Raises:
        TypeError: S is no whole number.
        ValueError: unknown names, S out of range, timesteps that do not decrease or leave 0..T-1,
            limits or rho that are not positive, a grid of sigma / alpha without sigma_max on a
            schedule with zero terminal SNR, limits that do not suit the grid, a grid that visits
            one level twice, or one that already ends at ``final``.
    """
    total = path.num_timesteps
    try:
        operator.index(steps)
    except TypeError:
        raise TypeError(f"steps must be a whole number, got {steps!r}") from None
    if final not in FINALS:
        raise ValueError(f"unknown final {final!r}, wanted one of {', '.join(FINALS)}")
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max), ("rho", rho)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    whole = isinstance(grid, str) and grid in _TIMES and grid != "uniform"
    if steps < 1 or (whole and steps > total):
        limits = f"in 1..{total} (the schedule's T)" if whole else "from 1 on"
        raise ValueError(f"steps must lie {limits}, got {steps}")
    if not isinstance(grid, str):
        given = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
        if given.ndim != 1:
            raise ValueError(f"a grid of timesteps must have shape [S], got {tuple(given.shape)}")
        points = [point_at_time(path, t) for t in _checked(given.tolist(), steps, total)]
    elif grid in _TIMES:
        if offset and grid != "leading":
            raise ValueError(f"an offset goes with a leading grid only, got {offset} with {grid}")
        times = [t + offset for t in _TIMES[grid](total, steps)]
        if times[0] > total - 1 or times[-1] < 0:
            raise ValueError(
                f"offset {offset} puts timesteps outside 0..{total - 1}: "
                f"{times[-1]:g}..{times[0]:g}"
            )
        if any(after >= before for before, after in pairwise(times)):
            raise ValueError(
                f"{steps} steps of the {grid} grid visit a timestep twice: the schedule has {total}"
            )
        points = [point_at_time(path, t) for t in times]
    elif grid in _RATIOS:
        low, high = level_limits(path, f"{grid} grid", sigma_min, sigma_max)
        points = [point_at_ratio(path, ratio) for ratio in ratios(grid, steps, low, high, rho)]
    else:
        raise ValueError(f"unknown grid {grid!r}, wanted one of {', '.join(NAMES)} or timesteps")
    if round_levels:
        points = _rounded(path, points)
    if final == "zero":
        return [*points, Point(-1.0, 1.0, 0.0)]
    end = point_at_ratio(path, sigma_min) if sigma_min else point_at_time(path, 0)
    if round_levels:
        end = nearest_timestep(path, end.ratio)
    if points[-1].ratio <= end.ratio * (1 + SAME_LEVEL_RTOL):
        raise ValueError(
            f'the grid {grid!r} already visits the last level before zero, so final="sigma_min" '
            'leaves its last step nothing to do: take final="zero" or another grid'
        )
    return [*points, end]


def _leading(total: int, steps: int) -> list[float]:
    return [float(i * (total // steps)) for i in reversed(range(steps))]


def _trailing(total: int, steps: int) -> list[float]:
    i = torch.arange(steps, dtype=torch.float64, device="cpu")
    return ((total - i * total / steps).round() - 1).tolist()


def _linspace(total: int, steps: int) -> list[float]:
    times = torch.linspace(total - 1, 0, steps, dtype=torch.float64, device="cpu")
    return times.round().tolist()


def _uniform(total: int, steps: int) -> list[float]:
    return [(total - 1) * (1 - i / steps) for i in range(steps)]


def _quadratic(total: int, steps: int) -> list[float]:
    if steps == 1:
        return [float(total - 1)]
    times = [round((total - 1) * (i / (steps - 1)) ** 2) for i in range(steps)]
    for i in range(1, steps):  # rounding gives several small i the same timestep
        times[i] = max(times[i], times[i - 1] + 1)
    return [float(t) for t in reversed(times)]


def _karras(low: float, high: float, steps: int, rho: float | None) -> list[float]:
    rho = 7.0 if rho is None else rho
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [(a + share * (b - a)) ** rho for share in _shares(steps)]


def _exponential(low: float, high: float, steps: int, rho: float | None) -> list[float]:
    return [high * (low / high) ** share for share in _shares(steps)]


def _polyexponential(low: float, high: float, steps: int, rho: float | None) -> list[float]:
    rho = 1.0 if rho is None else rho
    return [low * (high / low) ** ((1 - share) ** rho) for share in _shares(steps)]


def _logsnr(low: float, high: float, steps: int, rho: float | None) -> list[float]:
    return [high * (low / high) ** (i / steps) for i in range(steps)]


def _vp(low: float, high: float, steps: int, rho: float | None) -> list[float]:
    if steps == 1:
        return [high]
    time = preserving(low, high)
    return [time.level(1 + share * (VP_SMALLEST - 1)) for share in _shares(steps)]


def _iddpm(low: float, high: float, steps: int, rho: float | None) -> list[float]:
    path = schedules.cosine(IDDPM_TIMESTEPS)
    levels = [level for level in (path.sigma_t / path.alpha_t).tolist() if low <= level <= high]
    if len(levels) < steps:
        raise ValueError(
            f"the iddpm grid has {len(levels)} levels between {low:g} and {high:g}, "
            f"too few for {steps} steps"
        )
    return [levels[-1 - round(share * (len(levels) - 1))] for share in _shares(steps)]


def _shares(steps: int) -> list[float]:
    return [i / max(steps - 1, 1) for i in range(steps)]


_TIMES: dict[str, Callable[[int, int], list[float]]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "uniform": _uniform,
    "quadratic": _quadratic,
}
_RATIOS: dict[str, Callable[[float, float, int, float | None], list[float]]] = {
    "karras": _karras,
    "exponential": _exponential,
    "polyexponential": _polyexponential,
    "logsnr": _logsnr,
    "vp": _vp,
    "iddpm": _iddpm,
}
NAMES = (*_TIMES, *_RATIOS)


def ratios(grid: str, steps: int, low: float, high: float, rho: float | None = None) -> list[float]:
    """The levels sigma / alpha of a grid of them, from ``high`` on, see :func:`make`.

    Args:
        grid: karras, exponential, polyexponential, logsnr, vp or iddpm.
        steps: the number of levels, at least 1.
        low: ``sigma_min``.
        high: ``sigma_max``.
        rho: the grid's exponent.

    Raises:
        ValueError: not 0 < low < high, rho that is not positive, or limits that do not suit the
            grid.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"wanted 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    if rho is not None and not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive and finite, got {rho}")
    return _RATIOS[grid](low, high, steps, rho)


def _checked(times: list[float], steps: int, total: int) -> list[float]:
    """The timesteps that the caller gave as a grid; ValueError unless they decrease in 0..T-1."""
    if len(times) != steps:
        raise ValueError(f"steps is {steps}, but the grid has {len(times)} timesteps")
    if not all(b < a for a, b in pairwise(times)):  # in this form it also refuses NaN
        raise ValueError(f"the grid's timesteps must fall, got {times}")
    if not (times[-1] >= 0 and times[0] <= total - 1):
        raise ValueError(
            f"the grid's timesteps must lie in 0..{total - 1}, got {times[-1]:g}..{times[0]:g}"
        )
    return times


def _rounded(path: GaussianPath, points: list[Point]) -> list[Point]:
    """The points of the timesteps nearest to these; ValueError if two of them are one."""
    nearest = [nearest_timestep(path, point.ratio) for point in points]
    for (before, after), (kept, again) in zip(pairwise(points), pairwise(nearest), strict=True):
        if kept.t == again.t:
            raise ValueError(
                f"round_levels: the grid's levels {before.ratio:g} and {after.ratio:g} are both "
                f"nearest to timestep {kept.t:g}: take fewer steps or another grid"
            )
    return nearest


def level_limits(
    path: GaussianPath, what: str, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """The smallest and the largest sigma / alpha, those of the path's ends if not given.

    Args:
        path: the noise schedule.
        what: the grid or other user of the limits, for the error message.
        sigma_min: the smallest one, or None.
        sigma_max: the largest one, or None.

    Raises:
        ValueError: there is no largest one on this schedule.
    """
    low = point_at_time(path, 0).ratio if sigma_min is None else sigma_min
    high = point_at_time(path, path.num_timesteps - 1).ratio if sigma_max is None else sigma_max
    if math.isinf(high):
        raise ValueError(
            f"the {what} is one of sigma / alpha, which is infinite at this schedule's last "
            "timestep (zero terminal SNR): give sigma_max, or take another one"
        )
    return low, high
