"""Timesteps to train on: samplers that return timesteps and importance weights.

A sampler draws t with probability p_t and gives it the weight 1 / (T p_t), whose mean is 1. For any
p the weighted mean of losses L_t has the expectation of their mean over uniform t (Nichol &
Dhariwal 2021, arXiv:2102.09672, eq. 18); only the variance differs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.losses.densities import Density
from fastdiff.schedules import GaussianPath


class TimestepSampler:
    """Draws timesteps 0..T-1 independently, timestep t with probability p_t.

    Args:
        num_timesteps: T, at least 1.

    Raises:
        ValueError: T below 1.
    """

    def __init__(self, num_timesteps: int) -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
        self.num_timesteps = num_timesteps

    @property
    def probabilities(self) -> Tensor:
        """p_t, float64 [T] on the CPU."""
        count = self.num_timesteps
        return torch.full((count,), 1 / count, dtype=torch.float64, device="cpu")

    @property
    def weights(self) -> Tensor:
        """1 / (T p_t), float64 [T] on the CPU."""
        return 1 / (self.num_timesteps * self.probabilities)

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Timesteps, and the weights of their losses.

        Args:
            n: number of timesteps, at least 0.
            generator: source of randomness, None for PyTorch's global generator of the CPU.

        Returns:
            t int64 [n] and weights float64 [n], on the generator's device.

        Raises:
            ValueError: n below 0.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        t = _inverse(self.probabilities, self.unit(n, generator))
        return t, self.weights.to(t.device)[t]

    def quantiles(self, shares: Tensor) -> Tensor:
        """Timesteps below which shares of the weighted losses lie, in the mean over many draws.

        Importance weights make every density uniform, so these timesteps do not depend on what is
        recorded of losses.

        Args:
            shares: float64 [n], in [0, 1).

        Returns:
            t int64 [n], on the shares' device.
        """
        return (shares * self.num_timesteps).long()

    def unit(self, n: int, generator: torch.Generator | None) -> Tensor:
        """n numbers uniform in [0, 1), float64."""
        device = torch.device("cpu") if generator is None else generator.device
        return torch.rand(n, generator=generator, dtype=torch.float64, device=device)


class Uniform(TimestepSampler):
    """Every timestep with the same probability (Ho et al. 2020, arXiv:2006.11239, algorithm 1)."""


class LowDiscrepancy(TimestepSampler):
    """Timesteps of a batch spread evenly from one random offset; each by itself is uniform.

    Image i of n gets the timestep at the share (u + i / n) modulo 1 of 0..T-1 (Kingma et al. 2021,
    arXiv:2107.00630, appendix I.1), so that a batch of n has one timestep in every n-th part of the
    range. The loss of a batch keeps its mean and has less variance. The images must come in random
    order.
    """

    def unit(self, n: int, generator: torch.Generator | None) -> Tensor:
        """n numbers in [0, 1), float64, evenly spread from a random offset."""
        offset = super().unit(1, generator)
        return (offset + torch.arange(n, dtype=torch.float64, device=offset.device) / n) % 1


class LogitNormal(TimestepSampler):
    """t = floor(T s) with logit(s) normal: most often in the middle of the path.

    Esser et al. 2024, arXiv:2403.03206, section 3.1. There the density is meant to weight the loss:
    take ``unbiased=False`` for that. Importance weights undo it: the rare first and last timesteps
    get weights up to 10^8 with the default density and T = 1000.

    Args:
        num_timesteps: T, at least 1.
        mean: mean of logit(s); above 0 favours noisy timesteps.
        std: standard deviation of logit(s).
        unbiased: return the weights 1 / (T p_t); if False, return 1.

    Raises:
        ValueError: T below 1, a mean that is not finite, or a std that is not positive.
    """

    def __init__(
        self, num_timesteps: int, mean: float = 0.0, std: float = 1.0, *, unbiased: bool = True
    ) -> None:
        super().__init__(num_timesteps)
        if not math.isfinite(mean):
            raise ValueError(f"mean must be finite, got {mean}")
        if not 0 < std < math.inf:
            raise ValueError(f"std must be positive, got {std}")
        self.mean, self.std, self.unbiased = mean, std, unbiased

    @property
    def probabilities(self) -> Tensor:
        """p_t, float64 [T] on the CPU."""
        count = self.num_timesteps
        edges = torch.arange(count + 1, dtype=torch.float64, device="cpu") / count
        z = (torch.logit(edges) - self.mean) / self.std
        low, high = z[:-1], z[1:]
        # Above 0 take the difference of the upper tails, which loses no digits there.
        upper = low > 0
        low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
        root = math.sqrt(0.5)
        return (torch.special.erfc(-high * root) - torch.special.erfc(-low * root)) / 2

    @property
    def weights(self) -> Tensor:
        """1 / (T p_t) if ``unbiased``, else 1, float64 [T] on the CPU."""
        if self.unbiased:
            return super().weights
        return torch.ones(self.num_timesteps, dtype=torch.float64, device="cpu")

    def quantiles(self, shares: Tensor) -> Tensor:
        """As of every sampler if ``unbiased``, else the quantiles of p_t."""
        return super().quantiles(shares) if self.unbiased else _inverse(self.probabilities, shares)


class OfLogSNR(TimestepSampler):
    """Timesteps whose log-SNR has a density that is given: the mass of each timestep's cell.

    Cells meet half-way between the log-SNRs of neighbouring timesteps, and mass beyond the first
    and the last is dropped (Hang et al. 2024, arXiv:2407.03297, section 3.1). There the density is
    meant to weight the loss, for which the weights are 1.

    Args:
        schedule: the schedule, of T timesteps.
        density: of the log-SNR.

    Raises:
        ValueError: the density has no mass between the first and the last timestep.
    """

    def __init__(self, schedule: GaussianPath, density: Density) -> None:
        super().__init__(schedule.num_timesteps)
        log_snr = 2 * schedule.lambda_t
        edges = torch.cat([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
        mass = -density.cumulative(edges).diff()
        if len(mass) > 1 and not mass.sum() > 0:
            raise ValueError(f"no timestep of {schedule!r} has a log-SNR that {density!r} draws")
        self._probabilities = mass / mass.sum() if len(mass) > 1 else torch.ones_like(mass)

    @property
    def probabilities(self) -> Tensor:
        """p_t, float64 [T] on the CPU."""
        return self._probabilities

    @property
    def weights(self) -> Tensor:
        """1, float64 [T] on the CPU."""
        return torch.ones_like(self._probabilities)

    def quantiles(self, shares: Tensor) -> Tensor:
        """The quantiles of p_t, since the weights are 1."""
        return _inverse(self._probabilities, shares)


class LossSecondMoment(TimestepSampler):
    """p_t in proportion to the root mean square of the latest losses at t.

    This density gives the weighted loss the least variance (Nichol & Dhariwal 2021,
    arXiv:2102.09672, section 3.3, for the variational bound). Until every timestep has ``history``
    losses, t is uniform.

    Args:
        num_timesteps: T, at least 1.
        history: number of losses kept for each timestep.
        uniform: share of the timesteps that are drawn uniformly, in [0, 1].

    Raises:
        ValueError: T or history below 1, or a uniform share outside [0, 1].
    """

    def __init__(self, num_timesteps: int, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__(num_timesteps)
        if history < 1:
            raise ValueError(f"history must be at least 1, got {history}")
        if not 0 <= uniform <= 1:
            raise ValueError(f"uniform must lie in [0, 1], got {uniform}")
        self.history, self.uniform = history, uniform
        self._restart([[] for _ in range(num_timesteps)])

    @property
    def warm(self) -> bool:
        """Whether every timestep has ``history`` losses."""
        return self._filling == 0

    @property
    def probabilities(self) -> Tensor:
        """p_t, float64 [T] on the CPU."""
        total = self._norms.sum()
        if not self.warm or total == 0:
            return super().probabilities
        shares = self._norms / total
        return (1 - self.uniform) * shares + self.uniform / self.num_timesteps

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Record the losses of timesteps; beyond ``history`` the oldest are dropped.

        The host reads the losses, for which it waits for a GPU.

        Args:
            t: timesteps, int64 [n], in 0..T-1; a timestep may occur more than once.
            losses: unweighted losses at ``t``, floating point [n].

        Raises:
            TypeError: t not int64, or losses not floating point.
            ValueError: shapes that do not fit, or a loss that is not finite.
            IndexError: a timestep outside 0..T-1.
        """
        if t.dtype != torch.int64:
            raise TypeError(f"t must be int64, got {t.dtype}")
        if not losses.dtype.is_floating_point:
            raise TypeError(f"losses must be floating point, got {losses.dtype}")
        if t.ndim != 1 or t.shape != losses.shape:
            raise ValueError(
                "t and losses must have the same shape [n], "
                f"got {tuple(t.shape)} and {tuple(losses.shape)}"
            )
        steps, values = t.tolist(), losses.detach().double().tolist()
        wrong = next((step for step in steps if not 0 <= step < self.num_timesteps), None)
        if wrong is not None:
            raise IndexError(f"t must lie in 0..{self.num_timesteps - 1}, got {wrong}")
        bad = next((value for value in values if not math.isfinite(value)), None)
        if bad is not None:
            raise ValueError(f"losses must be finite, got {bad}")
        for step, value in zip(steps, values, strict=True):
            self._append(step, value)
        for step in set(steps):
            self._refresh(step)

    def state_dict(self) -> dict[str, Any]:
        """The settings and the losses of every timestep, oldest first.

        Values are numbers and lists of numbers, which JSON stores exactly.
        """
        return {
            "num_timesteps": self.num_timesteps,
            "history": self.history,
            "uniform": self.uniform,
            "losses": [list(kept) for kept in self._losses],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the :meth:`state_dict` of a sampler with the same settings.

        Raises:
            ValueError: other settings, more losses than ``history``, or a loss that is not finite.
        """
        for name in ("num_timesteps", "history", "uniform"):
            if state.get(name) != getattr(self, name):
                raise ValueError(
                    f"the state has {name} {state.get(name)!r}, this sampler {getattr(self, name)}"
                )
        losses = [[float(loss) for loss in kept] for kept in state.get("losses", ())]
        if len(losses) != self.num_timesteps or max(map(len, losses)) > self.history:
            raise ValueError(
                f"the state must have {self.num_timesteps} lists of up to {self.history} losses, "
                f"got {len(losses)} of up to {max(map(len, losses), default=0)}"
            )
        if not all(math.isfinite(loss) for kept in losses for loss in kept):
            raise ValueError("the state's losses must be finite")
        self._restart(losses)

    def _restart(self, losses: list[list[float]]) -> None:
        self._losses: list[deque[float]] = [deque(maxlen=self.history) for _ in losses]
        self._filling = self.num_timesteps  # number of timesteps whose history is not full yet
        # Full histories have one length, so their norms are proportional to root mean squares.
        self._norms = torch.zeros(self.num_timesteps, dtype=torch.float64, device="cpu")
        for step, kept in enumerate(losses):
            for loss in kept:
                self._append(step, loss)
            self._refresh(step)

    def _append(self, step: int, loss: float) -> None:
        kept = self._losses[step]
        if len(kept) == self.history - 1:
            self._filling -= 1
        kept.append(loss)

    def _refresh(self, step: int) -> None:
        # hypot scales its arguments, so that the squares of large losses do not overflow.
        self._norms[step] = math.hypot(*self._losses[step])


def _inverse(probabilities: Tensor, shares: Tensor) -> Tensor:
    """The timesteps, int64 [n], in which shares in [0, 1) of the probability lie."""
    cumulative = probabilities.cumsum(0)
    # After division the last entry is exactly 1, above every share: no t of probability 0 is taken.
    cumulative = (cumulative / cumulative[-1]).to(shares.device)
    return torch.searchsorted(cumulative, shares, right=True)
