"""Processes in continuous time that follow a schedule with timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.per_device import PerDevice
from fastdiff.schedules import FlowSchedule, NoiseSchedule
from fastdiff.sde.processes.linear_sde import SDE


class Interpolated(SDE):
    """A discrete noise schedule as a continuous process, exact at its timesteps.

    Timestep i is at t = (i + 1) / T. Between timesteps, and from t = 0 to the first, log alpha is
    linear in t (as in DPM-Solver, arXiv:2206.00927, appendix D.2).

    Args:
        schedule: a :class:`NoiseSchedule` whose last abar is above 0.

    Raises:
        ValueError: a schedule with zero terminal SNR, whose log alpha is infinite.
    """

    jumps = True

    def __init__(self, schedule: NoiseSchedule) -> None:
        if schedule.has_zero_terminal_snr:
            raise ValueError("a schedule with zero terminal SNR has no continuous view")
        self.schedule = schedule
        self.smallest = 1 / schedule.num_timesteps
        zero = torch.zeros(1, dtype=torch.float64, device="cpu")
        log_alpha = torch.cat([zero, schedule.alpha_t.log()])  # at t = 0, 1/T, 2/T...
        slope = log_alpha.diff() * schedule.num_timesteps
        self._line = log_alpha, slope
        self._lines: PerDevice[torch.device, tuple[Tensor, Tensor]] = PerDevice()

    def __repr__(self) -> str:
        return f"Interpolated({self.schedule!r})"

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f, which is constant between two timesteps, and g^2 = -2 f."""
        _, slope = self._on(t.device)
        f = slope[self._interval(t)]
        return f, -2 * f

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sqrt(1 - alpha^2)."""
        index = self._interval(t)
        start = index.double() / self.schedule.num_timesteps
        before, slope = self._on(t.device)
        log_alpha = before[index] + slope[index] * (t - start)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma with alpha^2 + sigma^2 = 1."""
        return self.schedule.levels(ratio)

    def time_at(self, ratio: Tensor) -> Tensor:
        """The time at which log alpha = -log(1 + ratio^2) / 2."""
        log_alpha = -torch.log1p(ratio**2) / 2
        count, (before, slope) = self.schedule.num_timesteps, self._on(ratio.device)
        index = (torch.searchsorted(-before, -log_alpha) - 1).clamp(0, count - 1)
        return index.double() / count + (log_alpha - before[index]) / slope[index]

    def label(self, t: Tensor) -> Tensor:
        """The schedule's label of the timestep T t - 1."""
        return self.schedule.label(self.schedule.num_timesteps * t - 1)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """log alpha [T + 1] and its slopes [T], cached: CUDA graphs cannot capture the copy."""
        if device not in self._lines:
            log_alpha, slope = self._line
            self._lines[device] = log_alpha.to(device), slope.to(device)
        return self._lines[device]

    def _interval(self, t: Tensor) -> Tensor:
        """The number 0..T-1 of the linear piece that t lies on; timestep i ends piece i."""
        count = self.schedule.num_timesteps
        return ((t * count - 1e-9).ceil().long() - 1).clamp(0, count - 1)


class Straight(SDE):
    """Rectified flow: x_t = (1 - t) x_0 + t eps (Liu et al. 2022, arXiv:2209.03003).

    As an SDE f = alpha'/alpha = -1 / (1 - t) and g^2 = 2 t - 2 f t^2 = 2 t / (1 - t). Both grow
    without bound towards t = 1, where x holds no signal. The probability flow
    f x - g^2 score / 2 = eps - x_0 does not grow, but computing it from a score multiplies the
    score's rounding error by 1 / (1 - t). So time ends at 0.999, with the prior N(0, 0.999^2): this
    drops a thousandth of x_0, and single precision still gives the flow to 1e-4.

    Args:
        num_timesteps: T of the :class:`fastdiff.schedules.FlowSchedule` whose labels the network
            gets.
        shift: the schedule's shift. It changes ``smallest`` and labels that are timesteps, not the
            process.
        label_by: the schedule's ``label_by``.

    Attributes:
        smallest: sigma at the schedule's first timestep.

    Raises:
        ValueError: arguments that FlowSchedule refuses; a first timestep noisier than ``end``.
    """

    end = 1 - 1e-3

    def __init__(
        self, num_timesteps: int = 1000, shift: float = 1.0, *, label_by: str = "sigma"
    ) -> None:
        schedule = FlowSchedule(num_timesteps, shift, label_by=label_by)
        self.num_timesteps, self.shift, self.label_by = num_timesteps, shift, label_by
        self.smallest = schedule.sigma_t[0].item()
        if self.smallest >= self.end:
            raise ValueError(
                f"the first timestep must be less noisy than {self.end}, got {self.smallest:g} "
                f"with num_timesteps={num_timesteps} and shift={shift}"
            )

    def __repr__(self) -> str:
        labels = "" if self.label_by == "sigma" else f", label_by={self.label_by!r}"
        return f"Straight(num_timesteps={self.num_timesteps}, shift={self.shift}{labels})"

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f = -1 / (1 - t) and g^2 = 2 t / (1 - t)."""
        return -1 / (1 - t), 2 * t / (1 - t)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha = 1 - t and sigma = t."""
        return 1 - t, t

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma with alpha + sigma = 1."""
        return 1 / (1 + ratio), ratio / (1 + ratio)

    def time_at(self, ratio: Tensor) -> Tensor:
        """ratio / (1 + ratio)."""
        return ratio / (1 + ratio)

    def label(self, t: Tensor) -> Tensor:
        """T t; with ``label_by`` "timestep", T s - 1 for t = shift s / (1 + (shift - 1) s)."""
        if self.label_by == "sigma":
            return self.num_timesteps * t
        return self.num_timesteps * t / (self.shift - (self.shift - 1) * t) - 1

    @property
    def prior_std(self) -> float:
        """sigma at ``end``."""
        return self.end
