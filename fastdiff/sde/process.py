"""Diffusion in continuous time: linear stochastic differential equations and their marginals.

    dx = f(t) x dt + g(t) dw,      x_t = alpha(t) x_0 + sigma(t) eps,      0 <= t <= end

from images at t = 0 to noise at t = end (Song et al. 2021, arXiv:2011.13456, section 3). Of alpha
and sigma follow f = alpha'/alpha and g^2 = (sigma^2)' - 2 f sigma^2, which the tests hold them to.

A time t has shape [N], one for each image, or [] for all of them. Coefficients are float64 and
rounded where they meet images, which come back in their own dtype.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.ops.checks import beside, check_floating


class SDE:
    """A linear SDE with scalar coefficients.

    Attributes:
        end: the time of the prior.
        smallest: the time at which sampling stops: below it the score grows without bounds.
        trained_from: the time from which on networks are trained and likelihoods are integrated,
            at most ``smallest``.
        extends: whether a network can be told of times beyond ``smallest`` and ``end``.
        jumps: whether f and g^2 jump from one timestep to the next, though log(alpha / sigma) does
            not: adaptive solvers of the probability flow then step in that.
    """

    end: float = 1.0
    smallest: float
    extends: bool = False
    jumps: bool = False

    @property
    def trained_from(self) -> float:
        """The time from which on networks are trained and likelihoods are integrated."""
        return self.smallest

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f(t) and g(t)^2, float64, shaped like ``t``."""
        raise NotImplementedError

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), float64, shaped like ``t``."""
        raise NotImplementedError

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """The alpha and sigma at which sigma / alpha is ``ratio``, float64, shaped like it.

        Beyond the process's ends, too, as far as its marginals go on.
        """
        raise NotImplementedError

    def time_at(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is ``ratio``, float64, shaped like it.

        Not limited to 0..end.
        """
        raise NotImplementedError

    def label(self, t: Tensor) -> Tensor:
        """What a network is given for its time."""
        raise NotImplementedError

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior that stands for the marginal at ``end``."""
        return 1.0

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(t) x, like ``x``.

        Args:
            x: images [N, ...], floating point.
            t: times [N] or [], in 0..end.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: times outside the range or of another shape.
        """
        f, _ = self.rates(self.check_time(t, x))
        return (beside(f, x) * x).to(x.dtype)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t), float64, shaped like ``t``; ValueError for times outside the range."""
        _, squared = self.rates(self.check_time(t))
        return squared.sqrt()

    def marginal(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [N, ...] and standard deviation [N, 1, ...] of x_t given x_0; raises as drift does.

        Song et al. 2021, arXiv:2011.13456, eq. 29.
        """
        alpha, sigma = self.levels(self.check_time(t, x0))
        return (beside(alpha, x0) * x0).to(x0.dtype), beside(sigma, x0)

    def snr(self, t: Tensor) -> Tensor:
        """(alpha / sigma)^2, float64, shaped like ``t``; ValueError for times outside the range."""
        alpha, sigma = self.levels(self.check_time(t))
        return (alpha / sigma) ** 2

    def prior_sample(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Noise of the prior, [N, ...]."""
        where = device if generator is None else generator.device
        drawn = torch.randn(shape, generator=generator, device=where, dtype=dtype)
        return drawn.to(device) * self.prior_std

    def prior_logp(self, z: Tensor) -> Tensor:
        """Log density of the prior at z [N, ...], in nats, float64 [N]."""
        check_floating(z, "z")
        flat = z.double().flatten(1) / self.prior_std
        size = flat.shape[1]
        constant = size * (0.5 * math.log(2 * math.pi) + math.log(self.prior_std))
        return -0.5 * flat.square().sum(1) - constant

    def check_time(self, t: Tensor, x: Tensor | None = None) -> Tensor:
        """``t`` in float64.

        Values are checked for CPU tensors only: looking at a GPU's would wait for it.

        Raises:
            TypeError: ``t`` is no floating point tensor, or ``x`` is not floating point.
            ValueError: a time outside 0..end, or a shape other than [N] or [].
        """
        if not isinstance(t, Tensor) or not t.is_floating_point():
            seen = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"t must be a floating point tensor, got {seen}")
        if x is not None:
            check_floating(x, "images")
            if t.shape not in ((), x.shape[:1]):
                raise ValueError(
                    f"t must have shape [] or [{x.shape[0]}], one time an image, "
                    f"got {tuple(t.shape)}"
                )
        looked_at = t.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked_at and not bool(((t >= 0) & (t <= self.end * (1 + 1e-6))).all()):
            raise ValueError(
                f"t must lie in 0..{self.end:g}, got values from {t.min().item():g} to "
                f"{t.max().item():g}"
            )
        return t.double()


class _Trained(SDE):
    """What processes share whose training begins earlier than their sampling stops.

    The noise at ``trained_from`` must be small beside the finest structure of the images: from 1e-3
    on, VP's likelihoods of images with a deviation of 0.003 given the others are 1.7 bits a
    dimension too high.
    """

    default_smallest: ClassVar[float]
    default_trained_from: ClassVar[float] = 1e-5

    def __init__(self, smallest: float | None, trained_from: float | None) -> None:
        self.smallest = self.default_smallest if smallest is None else smallest
        if trained_from is None:
            trained_from = min(self.default_trained_from, self.smallest)
        self._trained_from = trained_from
        if not 0 < self._trained_from <= self.smallest < self.end:
            raise ValueError(
                f"wanted 0 < trained_from <= smallest < {self.end:g}, got trained_from "
                f"{self._trained_from:g} and smallest {self.smallest:g}"
            )

    @property
    def trained_from(self) -> float:
        """As given."""
        return self._trained_from

    def _changed_times(self) -> str:
        """The two times as ``repr`` shows them: only where they are not the usual ones."""
        times = {"smallest": self.default_smallest, "trained_from": self.default_trained_from}
        shown = {name: getattr(self, name) for name, usual in times.items()}
        return "".join(f", {name}={t!r}" for name, t in shown.items() if t != times[name])


class VP(_Trained):
    """The variance-preserving SDE, DDPM's limit (Song et al. 2021, eq. 11 and 33).

    Args:
        beta_min: beta(0).
        beta_max: beta(1); beta rises linearly.
        smallest: the time at which sampling stops; None is 1e-3, as in the paper's code.
        trained_from: the time from which on networks are trained and likelihoods are integrated;
            None is 1e-5, likewise, or ``smallest`` if that is less.

    Raises:
        ValueError: not 0 < beta_min <= beta_max, or not 0 < trained_from <= smallest < 1.
    """

    default_smallest = 1e-3

    def __init__(
        self,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        *,
        smallest: float | None = None,
        trained_from: float | None = None,
    ) -> None:
        super().__init__(smallest, trained_from)
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(f"wanted 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(beta_min={self.beta_min}, beta_max={self.beta_max}"
            f"{self._changed_times()})"
        )

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f = -beta / 2 and g^2 = beta."""
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        return -0.5 * beta, beta

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sqrt(1 - alpha^2)."""
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Those with alpha^2 + sigma^2 = 1."""
        alpha = 1 / torch.sqrt(1 + ratio**2)
        return alpha, ratio * alpha

    def time_at(self, ratio: Tensor) -> Tensor:
        """The root of a quadratic: -log alpha = log(1 + ratio^2) / 2."""
        return self._time_of(torch.log1p(ratio**2) / 2)

    def label(self, t: Tensor) -> Tensor:
        """999 t: a network's time embedding was made for 1000 timesteps."""
        return 999 * t

    def _time_of(self, lost: Tensor) -> Tensor:
        """The time at which -log alpha is ``lost``, without cancellation near 0."""
        half = self.beta_min / 2
        return 2 * lost / (half + (half**2 + (self.beta_max - self.beta_min) * lost).sqrt())

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min


class SubVP(VP):
    """The sub-variance-preserving SDE (Song et al. 2021, eq. 12 and 29): less noise than VP.

    Arguments as :class:`VP` has them.
    """

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f = -beta / 2 and g^2 = beta (1 - alpha^4)."""
        f, beta = super().rates(t)
        return f, -beta * torch.expm1(4 * self._log_alpha(t))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and 1 - alpha^2; no root."""
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Those with alpha^2 + sigma = 1."""
        alpha = torch.exp(-torch.asinh(ratio / 2))
        return alpha, ratio * alpha

    def time_at(self, ratio: Tensor) -> Tensor:
        """As in VP: 1 / alpha - alpha = ratio, so that -log alpha = asinh(ratio / 2)."""
        return self._time_of(torch.asinh(ratio / 2))


class VE(_Trained):
    """The variance-exploding SDE, NCSN's limit (Song et al. 2021, eq. 9 and 30).

    Args:
        sigma_min: sigma(0).
        sigma_max: sigma(1); sigma rises geometrically.
        smallest: the time at which sampling stops; None is 1e-5, as in the paper's code.
        trained_from: the time from which on networks are trained and likelihoods are integrated;
            None is 1e-5, likewise, or ``smallest`` if that is less.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or not 0 < trained_from <= smallest < 1.
    """

    default_smallest = 1e-5

    def __init__(
        self,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        *,
        smallest: float | None = None,
        trained_from: float | None = None,
    ) -> None:
        super().__init__(smallest, trained_from)
        _check_sigmas(sigma_min, sigma_max)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def __repr__(self) -> str:
        return f"VE(sigma_min={self.sigma_min}, sigma_max={self.sigma_max}{self._changed_times()})"

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f = 0 and g^2 = 2 sigma^2 log(sigma_max / sigma_min)."""
        _, sigma = self.levels(t)
        return torch.zeros_like(sigma), sigma**2 * (2 * math.log(self.sigma_max / self.sigma_min))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 and sigma_min (sigma_max / sigma_min)^t."""
        sigma = self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))
        return torch.ones_like(sigma), sigma

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """1 and the ratio."""
        return torch.ones_like(ratio), ratio

    def time_at(self, ratio: Tensor) -> Tensor:
        """log(ratio / sigma_min) / log(sigma_max / sigma_min)."""
        return (ratio / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def label(self, t: Tensor) -> Tensor:
        """999 t, which log sigma(t) rises with."""
        return 999 * t

    @property
    def prior_std(self) -> float:
        """sigma_max."""
        return self.sigma_max


class EDM(SDE):
    """x_t = x_0 + t eps, the time being the noise's deviation (Karras et al. 2022).

    arXiv:2206.00364, table 1 (column "ours") and section 5.

    Args:
        sigma_min: where sampling stops.
        sigma_max: where it begins.
        sigma_data: standard deviation of the images, for the preconditioning.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or sigma_data not positive.
    """

    extends = True  # algorithm 2 evaluates the network beyond sigma_max

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5
    ) -> None:
        _check_sigmas(sigma_min, sigma_max)
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data
        self.smallest, self.end = sigma_min, sigma_max

    def __repr__(self) -> str:
        return f"EDM(sigma_min={self.smallest}, sigma_max={self.end}, sigma_data={self.sigma_data})"

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f = 0 and g^2 = 2 t."""
        return torch.zeros_like(t), 2 * t

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 and t."""
        return torch.ones_like(t), t

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """1 and the ratio."""
        return torch.ones_like(ratio), ratio

    def time_at(self, ratio: Tensor) -> Tensor:
        """The ratio."""
        return ratio

    def label(self, t: Tensor) -> Tensor:
        """log(t) / 4, c_noise of the preconditioning."""
        return t.log() / 4

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in of D(x, t) = c_skip x + c_out F(c_in x, label) (eq. 7).

        With them the network's input and its target have variance 1 at every t, and errors of F are
        amplified the least.
        """
        variance = t**2 + self.sigma_data**2
        return (
            self.sigma_data**2 / variance,
            t * self.sigma_data / variance.sqrt(),
            1 / variance.sqrt(),
        )

    @property
    def prior_std(self) -> float:
        """sigma_max."""
        return self.end


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"wanted 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
