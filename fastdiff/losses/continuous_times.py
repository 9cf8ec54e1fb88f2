"""The training times of an SDE: even, of a density of the log-SNR, EDM's levels or ncsn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastdiff.common.inputs import check_choice
from fastdiff.losses.densities import Cosh, Density, Laplace
from fastdiff.losses.score_matching import log_normal_quantiles, log_normal_sigma
from fastdiff.losses.timesteps import LowDiscrepancy, TimestepSampler, Uniform
from fastdiff.sde import EDM, SDE, VE

DENSITIES: dict[str, Density] = {"laplace": Laplace(), "cosh": Cosh()}
EVEN: dict[str, Callable[[int], TimestepSampler]] = {
    "uniform": Uniform,
    "low-discrepancy": LowDiscrepancy,
}
CONTINUOUS = (*EVEN, *DENSITIES)
DEFAULT_LEVELS = 100  # number of noise levels of ncsn


class Times(Protocol):
    """A sampler of training times with importance weights."""

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Times [n] and the weights of their losses, float64 [n]."""

    def quantiles(self, shares: Tensor) -> Tensor:
        """Times at shares [n] of all weighted draws, the earliest first."""


def times_of(
    name: str, forward: SDE, times: str | None, levels: int | None
) -> tuple[Times, int | None]:
    """The sampler of an SDE's training times, and the number of levels of ncsn, else None."""
    if isinstance(forward, EDM):
        times = times or "log-normal"
        check_choice(f"timestep sampler with {forward!r}", times, ("log-normal", *DENSITIES))
        if times in DENSITIES:
            return _LogSNRTimes(forward, DENSITIES[times]), None
        return _LogNormal(forward), None
    if name == "ncsn":
        assert isinstance(forward, VE)
        check_choice("timestep sampler with ncsn", times or "uniform", ("uniform",))
        levels = DEFAULT_LEVELS if levels is None else levels
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        return _GeometricLevels(levels), levels
    times = times or "uniform"
    check_choice("timestep sampler in continuous time", times, CONTINUOUS)
    if times in DENSITIES:
        return _LogSNRTimes(forward, DENSITIES[times]), None
    return _TimeInterval(forward, EVEN[times](1)), None


class _TimeInterval:
    """Times trained_from..end of an SDE, with the distribution of a sampler of timesteps."""

    def __init__(self, forward: SDE, spread: TimestepSampler) -> None:
        self.first, self.length = forward.trained_from, forward.end - forward.trained_from
        self.spread = spread

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        share = self.spread.unit(n, generator)
        return self.first + self.length * share, torch.ones_like(share)

    def quantiles(self, shares: Tensor) -> Tensor:
        return self.first + self.length * shares


class _LogSNRTimes:
    """Times of an SDE whose log-SNR has a density, cut to the times that are trained."""

    def __init__(self, forward: SDE, density: Density) -> None:
        self.forward, self.density = forward, density
        ends = torch.tensor([forward.end, forward.trained_from], dtype=torch.float64, device="cpu")
        alpha, sigma = forward.levels(ends)
        self.low, self.high = density.cumulative(2 * (alpha / sigma).log()).tolist()

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        time = self.quantiles(1 - Uniform(1).unit(n, generator))
        return time, torch.ones_like(time)

    def quantiles(self, shares: Tensor) -> Tensor:
        log_snr = self.density.quantile(self.high - (self.high - self.low) * shares)
        time = self.forward.time_at(torch.exp(-log_snr / 2))
        return time.clamp(self.forward.trained_from, self.forward.end)


class _LogNormal:
    """EDM's log-normal noise levels (Karras et al. 2022, table 1), clamped to the process's."""

    def __init__(self, forward: EDM) -> None:
        self.forward = forward

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        sigma = log_normal_sigma(n, generator=generator)
        return self._within(sigma), torch.ones_like(sigma)

    def quantiles(self, shares: Tensor) -> Tensor:
        return self._within(log_normal_quantiles(shares))

    def _within(self, sigma: Tensor) -> Tensor:
        return sigma.clamp(self.forward.smallest, self.forward.end)


class _GeometricLevels:
    """Evenly spaced times 0..1 of VE, at which sigma is a geometric sequence."""

    def __init__(self, levels: int) -> None:
        self.levels = Uniform(levels)

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        level, weights = self.levels.draw(n, generator)
        return self._time(level), weights

    def quantiles(self, shares: Tensor) -> Tensor:
        return self._time(self.levels.quantiles(shares))

    def _time(self, level: Tensor) -> Tensor:
        return level.double() / (self.levels.num_timesteps - 1)
