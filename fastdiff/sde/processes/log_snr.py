"""Variance-preserving processes that are defined by their log-SNR (Kingma et al. 2021).

    alpha(t)^2 = sigmoid(l(t)),      sigma(t)^2 = sigmoid(-l(t)),      l falls from t = 0 to t = 1

Variational diffusion models, arXiv:2107.00630, section 3.1, where l is -gamma. The network gets l
itself, mapped to 0..999 by a straight line between its ends, and not t. So what a network learns
does not depend on how l falls between the ends, and it can be sampled by another process with the
same ends (section 5.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.sde.processes.linear_sde import SDE

BISECTIONS = 60  # halve the interval 0..1 to below the spacing of float64


class LogSNR(SDE):
    """The base of these processes: all but the log-SNR as a function of t, and its derivative.

    Args:
        log_snr_max: l(0), log(alpha^2 / sigma^2) of the least noise.
        log_snr_min: l(1).

    Raises:
        ValueError: limits that are not finite or do not fall.
    """

    smallest = 1e-5  # time is positive in the solvers; l has hardly fallen there

    def __init__(self, log_snr_max: float, log_snr_min: float) -> None:
        if not -math.inf < log_snr_min < log_snr_max < math.inf:
            raise ValueError(
                f"wanted finite log_snr_max > log_snr_min, got {log_snr_max} and {log_snr_min}"
            )
        self.log_snr_max, self.log_snr_min = log_snr_max, log_snr_min

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.log_snr_max}, {self.log_snr_min})"

    def log_snr(self, t: Tensor) -> Tensor:
        """l(t), float64, shaped like ``t``."""
        raise NotImplementedError

    def log_snr_rate(self, t: Tensor) -> Tensor:
        """l'(t), negative, float64, shaped like ``t``."""
        raise NotImplementedError

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The time at which l is ``log_snr``, float64, shaped like it."""
        raise NotImplementedError

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f = sigma^2 l' / 2 and g^2 = -sigma^2 l'."""
        squared = -torch.sigmoid(-self.log_snr(t)) * self.log_snr_rate(t)
        return -squared / 2, squared

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha = sqrt(sigmoid(l)) and sigma = sqrt(sigmoid(-l))."""
        return self.levels_of(self.log_snr(t))

    def levels_of(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma where l is ``log_snr``, float64, shaped like it."""
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma with alpha^2 + sigma^2 = 1."""
        alpha = 1 / torch.sqrt(1 + ratio**2)
        return alpha, ratio * alpha

    def time_at(self, ratio: Tensor) -> Tensor:
        """The time at which l = -2 log ratio."""
        return self.time_of(-2 * ratio.log())

    def label(self, t: Tensor) -> Tensor:
        """999 (l_max - l) / (l_max - l_min): 0 for the least noise, 999 for the most.

        The ends are those of the process itself, with a shift if it has one.
        """
        return self.label_of(self.log_snr(t))

    def label_of(self, log_snr: Tensor) -> Tensor:
        """:meth:`label` where l is ``log_snr``, shaped like it."""
        ends = self.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64, device=log_snr.device))
        return 999 * (ends[0] - log_snr) / (ends[0] - ends[1])


class LinearLogSNR(LogSNR):
    """The log-SNR falls at a constant rate (Kingma et al. 2021, arXiv:2107.00630, appendix H).

    Args:
        log_snr_max: l(0); the paper's 13.3 leaves noise of 0.0013.
        log_snr_min: l(1).

    Raises:
        ValueError: limits that are not finite or do not fall.
    """

    def __init__(self, log_snr_max: float = 13.3, log_snr_min: float = -5.0) -> None:
        super().__init__(log_snr_max, log_snr_min)

    def log_snr(self, t: Tensor) -> Tensor:
        """l_max + t (l_min - l_max)."""
        return self.log_snr_max + t * (self.log_snr_min - self.log_snr_max)

    def log_snr_rate(self, t: Tensor) -> Tensor:
        """l_min - l_max at every t."""
        return torch.full_like(t, self.log_snr_min - self.log_snr_max)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """(l_max - l) / (l_max - l_min)."""
        return (self.log_snr_max - log_snr) / (self.log_snr_max - self.log_snr_min)


class CosineLogSNR(LogSNR):
    """l = -2 log tan(angle) + shift, the angle linear in t (Hoogeboom et al. 2023, section 3.1).

    Simple diffusion, arXiv:2301.11093: without the shift the cosine schedule, alpha = cos(angle),
    between two limits.

    Args:
        log_snr_max: l(0) without the shift.
        log_snr_min: l(1) without the shift.
        shift: added to l. For images of side d the paper takes 2 log(64 / d), or with 32 in place
            of 64: large images need more noise, see ``schedules.shifted_cosine``.

    Raises:
        ValueError: limits that are not finite or do not fall, or a shift that is not finite.
    """

    def __init__(
        self, log_snr_max: float = 15.0, log_snr_min: float = -15.0, shift: float = 0.0
    ) -> None:
        super().__init__(log_snr_max, log_snr_min)
        if not math.isfinite(shift):
            raise ValueError(f"shift must be finite, got {shift}")
        self.shift = shift
        self._first, last = (math.atan(math.exp(-end / 2)) for end in (log_snr_max, log_snr_min))
        self._range = last - self._first

    def __repr__(self) -> str:
        shift = f", shift={self.shift}" if self.shift else ""
        return f"CosineLogSNR({self.log_snr_max}, {self.log_snr_min}{shift})"

    def log_snr(self, t: Tensor) -> Tensor:
        """-2 log tan(angle) + shift."""
        return -2 * torch.tan(self._first + t * self._range).log() + self.shift

    def log_snr_rate(self, t: Tensor) -> Tensor:
        """-4 angle' / sin(2 angle)."""
        return -4 * self._range / torch.sin(2 * (self._first + t * self._range))

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The time at which tan(angle) = exp((shift - l) / 2)."""
        return (torch.atan(torch.exp((self.shift - log_snr) / 2)) - self._first) / self._range


class LearnedLogSNR(LogSNR):
    """A log-SNR that is learned: a monotone network (Kingma et al. 2021, appendix H).

    arXiv:2107.00630. With positive weights w, -l is w_1 t + w_3 sigmoid(w_2 w_1 t + b), brought to
    the given ends. In continuous time the likelihood does not depend on l between the ends, but the
    variance of its estimate, and so of training's gradients, does: train
    :attr:`network` to minimise it, see ``fastdiff.losses.score_matching.diffusion_loss``.

    Args:
        log_snr_max: l(0).
        log_snr_min: l(1).
        hidden: number of hidden units; the paper has 1024.

    Attributes:
        network: the module with the parameters, float64, on the CPU, where l is computed. It
            begins near a straight line.
        hidden: number of hidden units.

    Raises:
        ValueError: limits that are not finite or do not fall, or fewer than 1 hidden unit.
    """

    def __init__(
        self, log_snr_max: float = 13.3, log_snr_min: float = -5.0, hidden: int = 1024
    ) -> None:
        super().__init__(log_snr_max, log_snr_min)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.hidden, self.network = hidden, _Monotone(hidden)

    def log_snr(self, t: Tensor) -> Tensor:
        """l(t), differentiable in the network's parameters."""
        first, last = self._ends()
        share = (self.network.values(t.cpu()) - first) / (last - first)
        return (self.log_snr_max + share * (self.log_snr_min - self.log_snr_max)).to(t.device)

    def log_snr_rate(self, t: Tensor) -> Tensor:
        """l'(t), differentiable in the network's parameters."""
        first, last = self._ends()
        slopes = self.network.slopes(t.cpu()) / (last - first)
        return (slopes * (self.log_snr_min - self.log_snr_max)).to(t.device)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """The network's values at t = 0 and 1."""
        first, last = self.network.values(
            torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
        )
        return first, last

    @torch.no_grad()
    def time_of(self, log_snr: Tensor) -> Tensor:
        """The time by bisection; values beyond the ends of l give 0 or 1."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            before = self.log_snr(middle) > log_snr
            low, high = torch.where(before, middle, low), torch.where(before, high, middle)
        return (low + high) / 2


class _Monotone(nn.Module):
    """w_1 t + w_3 sigmoid(w_2 w_1 t + b), rising since every weight is the softplus of a number."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        place = torch.linspace(0, 1, hidden, dtype=torch.float64, device="cpu")
        # Sigmoids of width 0.1 with centres all over 0..1, that add up to about a straight line.
        self.slope = _parameter(torch.ones_like(place[:1]))
        self.steepness = _parameter(torch.full_like(place, 10.0))
        self.bias = nn.Parameter(-10 * place)
        self.height = _parameter(torch.full_like(place, 1 / hidden))

    def values(self, t: Tensor) -> Tensor:
        """The function at times of any shape."""
        line, weights = self._line(t), functional.softplus(self.height)
        return line + torch.sigmoid(self._inside(line)) @ weights

    def slopes(self, t: Tensor) -> Tensor:
        """Its derivative at times of any shape."""
        weights = functional.softplus(self.height) * functional.softplus(self.steepness)
        hidden = torch.sigmoid(self._inside(self._line(t)))
        return functional.softplus(self.slope) * (1 + (hidden * (1 - hidden)) @ weights)

    def _line(self, t: Tensor) -> Tensor:
        return functional.softplus(self.slope) * t

    def _inside(self, line: Tensor) -> Tensor:
        return line[..., None] * functional.softplus(self.steepness) + self.bias


def _parameter(value: Tensor) -> nn.Parameter:
    """The number whose softplus is ``value``."""
    return nn.Parameter(torch.log(torch.expm1(value)))
