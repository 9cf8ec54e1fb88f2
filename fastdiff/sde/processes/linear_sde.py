"""Diffusion in continuous time: linear stochastic differential equations and their marginals.

    dx = f(t) x dt + g(t) dw,      x_t = alpha(t) x_0 + sigma(t) eps,      0 <= t <= end

from images at t = 0 to noise at t = end (Song et al. 2021, arXiv:2011.13456, section 3). alpha and
sigma determine f = alpha'/alpha and g^2 = (sigma^2)' - 2 f sigma^2; tests check each process.

A time t has shape [N], one for each image, or [] for all images. Coefficients are float64 and are
rounded when they are combined with images. Results have the dtype of the images.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.common.checks import beside, check_floating


class SDE:
    """A linear SDE with scalar coefficients.

    Attributes:
        end: the time of the prior.
        smallest: the time at which sampling stops; towards 0 the score grows without bound.
        trained_from: the smallest time of training and of likelihoods, at most ``smallest``.
        extends: whether networks accept times below ``smallest`` and above ``end``.
        jumps: whether f and g^2 are discontinuous at timesteps. Adaptive solvers of the probability
            flow then take steps in log(alpha / sigma), which is continuous.
    """

    end: float = 1.0
    smallest: float
    extends: bool = False
    jumps: bool = False

    @property
    def trained_from(self) -> float:
        """The smallest time at which networks are trained and likelihoods begin."""
        return self.smallest

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f(t) and g(t)^2, float64, shaped like ``t``."""
        raise NotImplementedError

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), float64, shaped like ``t``."""
        raise NotImplementedError

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """The alpha and sigma at which sigma / alpha is ``ratio``, float64, shaped like ``ratio``.

        The ratio may lie beyond the ends of the process where its formulae are defined.
        """
        raise NotImplementedError

    def time_at(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is ``ratio``, float64, shaped like ``ratio``.

        The result is not limited to 0..end.
        """
        raise NotImplementedError

    def label(self, t: Tensor) -> Tensor:
        """The value that a network gets as its time, shaped like ``t``."""
        raise NotImplementedError

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior, which approximates the marginal at ``end``."""
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
        """Mean [N, ...] and standard deviation [N, 1, ...] of x_t given x_0.

        Song et al. 2021, arXiv:2011.13456, eq. 29. Raises the errors of :meth:`drift`.
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
        """Samples of the prior.

        Args:
            shape: shape of the samples, [N, ...].
            generator: source of the noise, None for PyTorch's global one of ``device``.
            device: device of the result; noise of another device's generator is copied to it.
            dtype: dtype of the result.
        """
        where = device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=where, dtype=dtype)
        return noise.to(device) * self.prior_std

    def prior_logp(self, z: Tensor) -> Tensor:
        """Log density of the prior at z [N, ...], in nats, float64 [N]."""
        check_floating(z, "z")
        flat = z.double().flatten(1) / self.prior_std
        size = flat.shape[1]
        constant = size * (0.5 * math.log(2 * math.pi) + math.log(self.prior_std))
        return -0.5 * flat.square().sum(1) - constant

    def check_time(self, t: Tensor, x: Tensor | None = None) -> Tensor:
        """``t`` in float64, checked.

        Values are checked for CPU tensors only: reading values of a GPU would wait for it.

        Raises:
            TypeError: ``t`` or ``x`` is not a floating point tensor.
            ValueError: a time outside 0..end, or a shape other than [N] or [].
        """
        if not isinstance(t, Tensor) or not t.is_floating_point():
            seen = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"t must be a floating point tensor, got {seen}")
        if x is not None:
            check_floating(x, "images")
            if t.shape not in ((), x.shape[:1]):
                raise ValueError(
                    f"t must have shape [] or [{x.shape[0]}], one time per image, "
                    f"got {tuple(t.shape)}"
                )
        readable = t.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and not bool(((t >= 0) & (t <= self.end * (1 + 1e-6))).all()):
            raise ValueError(
                f"t must lie in 0..{self.end:g}, got values from {t.min().item():g} to "
                f"{t.max().item():g}"
            )
        return t.double()


class TrainedFromEarlier(SDE):
    """A process that is trained at times down to ``trained_from``, below ``smallest``.

    The noise at ``trained_from`` must be small beside the finest structure of the images. For
    pixels whose standard deviation given the others is 0.003, likelihoods of VP from time 1e-3 are
    1.7 bits per dimension too high.
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
        """The smallest time of training and likelihoods, as given to the constructor."""
        return self._trained_from

    def changed_times(self) -> str:
        """The arguments ``smallest`` and ``trained_from`` for ``repr``, without default values."""
        times = {"smallest": self.default_smallest, "trained_from": self.default_trained_from}
        shown = {name: getattr(self, name) for name, usual in times.items()}
        return "".join(f", {name}={t!r}" for name, t in shown.items() if t != times[name])


def check_sigmas(sigma_min: float, sigma_max: float) -> None:
    """ValueError unless 0 < sigma_min < sigma_max, both finite."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"wanted 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
