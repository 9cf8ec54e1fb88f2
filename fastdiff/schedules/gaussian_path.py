"""Gaussian paths: how much signal and how much noise x_t holds at every timestep.

Every schedule is a Gaussian path x_t = alpha_t x_0 + sigma_t eps for t = 0..T-1. DDPM's path
follows from betas, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (Ho et al. 2020,
arXiv:2006.11239, eq. 2; t counts from 0 here). Rectified flow's path is a straight line. All
tables are float64 on the CPU: single precision already loses three digits of the posterior
variance at small t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.common.per_device import PerDevice

RESCALED_TO = 1000  # timesteps of the schedule whose labels a rescaled one has
ONE = torch.ones(1, dtype=torch.float64, device="cpu")  # abar_{-1}, before the first timestep
LABELS = ("sigma", "timestep")  # choices for ``label_by`` of FlowSchedule

Value = TypeVar("Value")


def _for_autograd() -> AbstractContextManager[Any]:
    """A context in which tensors to be cached are made: it leaves inference mode.

    A backward pass cannot save tensors made in inference mode. Outside inference mode the context
    does nothing, so that a compiled graph need not switch modes.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _table(compute: Callable[[Any], Value]) -> cached_property[Value]:
    """A property that is computed once, never in inference mode."""

    @wraps(compute)
    def compute_for_autograd(self: Any) -> Value:
        with _for_autograd():
            return compute(self)

    return cached_property(compute_for_autograd)


class GaussianPath:
    """x_t = alpha_t x_0 + sigma_t eps, the marginals that samplers and predictions rest on.

    Attributes:
        alpha_t: coefficient of the signal, float64 [T].
        sigma_t: coefficient of the noise, float64 [T].
        extends: whether models accept timesteps below 0 and above T - 1, which stand for noise
            levels beyond those of the first and the last timestep.
    """

    alpha_t: Tensor
    sigma_t: Tensor
    extends: bool = False

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return self.alpha_t.numel()

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether alpha at the last timestep is 0, where eps says nothing about x_0."""
        return bool(self.alpha_t[-1] == 0)

    @_table
    def snr(self) -> Tensor:
        """Signal-to-noise ratio (alpha_t / sigma_t)^2 (Kingma et al. 2021, arXiv:2107.00630)."""
        return (self.alpha_t / self.sigma_t) ** 2

    @_table
    def lambda_t(self) -> Tensor:
        """log(alpha_t / sigma_t), half the log-SNR (DPM-Solver, arXiv:2206.00927, section 2)."""
        return (self.alpha_t / self.sigma_t).log()

    def levels(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """The alpha and sigma of this path at which sigma / alpha is ``ratio`` (finite)."""
        raise NotImplementedError

    def label(self, t: Tensor, sigma: Tensor) -> Tensor:
        """The value that a network gets as its time: t, unless a subclass defines another.

        Args:
            t: timesteps in 0..T-1, fractions allowed, of any shape.
            sigma: coefficients of the noise at ``t``, of the same shape.
        """
        return t

    def labels_of(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """:meth:`label` at whole timesteps, for training.

        Args:
            t: timesteps int64 [N], in 0..T-1.
            dtype: dtype of fractional labels; whole-number labels are int64, as in sampling.
        """
        if self.labels_are_timesteps:
            return t
        key = (t.device, dtype)
        if key not in self._labels:
            with _for_autograd():
                steps = torch.arange(self.num_timesteps, dtype=torch.float64, device="cpu")
                labels = self.label(steps, self.sigma_t)
                whole = bool((labels == labels.round()).all())
                self._labels[key] = labels.to(t.device, torch.int64 if whole else dtype)
        return self._labels[key][t]

    def timestep(self, label: Tensor) -> Tensor:
        """The inverse of :meth:`label`: the timesteps, perhaps fractional, of these labels."""
        return label

    @property
    def labels_are_timesteps(self) -> bool:
        """Whether :meth:`label` gives the timesteps themselves."""
        return True

    @_table
    def _labels(self) -> PerDevice[tuple[torch.device, torch.dtype], Tensor]:
        return PerDevice()

    def coefficients(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t as [T] tensors on ``device``, cached."""
        key = (device, dtype)
        if key not in self._coefficients:
            with _for_autograd():
                self._coefficients[key] = (
                    self.alpha_t.to(device, dtype),
                    self.sigma_t.to(device, dtype),
                )
        return self._coefficients[key]

    @_table
    def _coefficients(self) -> PerDevice[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]]:
        return PerDevice()


class NoiseSchedule(GaussianPath):
    """Betas and the coefficients derived from them, float64 tensors of shape [T].

    Args:
        betas: forward variances beta_t, shape [T], each in (0, 1]; before the last step they must
            leave some signal, abar_t > 0.
        name: the schedule's name in ``schedules.NAMES``, if it has one.
        options: the arguments of the function of that name, so that a checkpoint can record them.
        rescale_timesteps: the network is told 1000 t / T and not t, see
            :func:`fastdiff.schedules.rescale_timesteps`.

    Raises:
        ValueError: ``betas`` has another shape or values outside (0, 1], or no signal is left
            before the last step.
    """

    def __init__(
        self,
        betas: Tensor,
        *,
        name: str = "custom",
        options: dict[str, Any] | None = None,
        rescale_timesteps: bool = False,
    ) -> None:
        with _for_autograd():
            betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").clone()
        if betas.ndim != 1 or betas.numel() == 0:
            raise ValueError(f"betas must have shape [T] with T >= 1, got {tuple(betas.shape)}")
        if not bool(((1 - betas < 1) & (betas <= 1)).all()):
            raise ValueError(
                "betas must lie in (0, 1], more than 1e-16, "
                f"got values from {betas.min().item():g} to {betas.max().item():g}"
            )
        self.betas = betas
        gone = int((self.alphas_cumprod == 0).sum())
        if gone > 1:
            raise ValueError(
                "only the last step may have no signal at all (abar = 0), "
                f"but abar is 0 from step {self.num_timesteps - gone} of {self.num_timesteps} on"
            )
        self.name = name
        self.options = dict(options or {})
        self.rescale_timesteps = rescale_timesteps

    def __repr__(self) -> str:
        rescaled = {"rescale_timesteps": True} if self.rescale_timesteps else {}
        given = {**self.options, **rescaled}
        options = "".join(f", {key}={value!r}" for key, value in given.items())
        return f"NoiseSchedule({self.name!r}, num_timesteps={self.num_timesteps}{options})"

    @property
    def alpha_t(self) -> Tensor:  # type: ignore[override]
        """sqrt(abar_t)."""
        return self.sqrt_alphas_cumprod

    @property
    def sigma_t(self) -> Tensor:  # type: ignore[override]
        """sqrt(1 - abar_t)."""
        return self.sqrt_one_minus_alphas_cumprod

    def levels(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma with alpha^2 + sigma^2 = 1 and sigma / alpha = ``ratio``."""
        alpha = 1 / torch.sqrt(1 + ratio**2)
        return alpha, ratio * alpha

    @property
    def labels_are_timesteps(self) -> bool:
        """Whether the network is told t and not 1000 t / T."""
        return not self.rescale_timesteps

    def label(self, t: Tensor, sigma: Tensor | None = None) -> Tensor:
        """t, or 1000 t / T where ``rescale_timesteps`` is set, whatever sigma is."""
        return RESCALED_TO * t / self.num_timesteps if self.rescale_timesteps else t

    def timestep(self, label: Tensor) -> Tensor:
        """The inverse of :meth:`label`."""
        return label * self.num_timesteps / RESCALED_TO if self.rescale_timesteps else label

    @_table
    def alphas(self) -> Tensor:
        """alpha_t = 1 - beta_t."""
        return 1 - self.betas

    @_table
    def alphas_cumprod(self) -> Tensor:
        """abar_t, the product of alpha_0..alpha_t: signal power of q(x_t | x_0)."""
        return self.alphas.cumprod(0)

    @_table
    def alphas_cumprod_prev(self) -> Tensor:
        """abar_{t-1}, with abar_{-1} = 1."""
        return torch.cat([ONE, self.alphas_cumprod[:-1]])

    @_table
    def sqrt_alphas_cumprod(self) -> Tensor:
        """sqrt(abar_t), the coefficient of x_0 in x_t."""
        return self.alphas_cumprod.sqrt()

    @_table
    def sqrt_one_minus_alphas_cumprod(self) -> Tensor:
        """sqrt(1 - abar_t), the coefficient of the noise in x_t."""
        return (1 - self.alphas_cumprod).sqrt()

    @_table
    def posterior_variance(self) -> Tensor:
        """beta_tilde_t, variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 7); 0 at t = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @_table
    def posterior_log_variance_clipped(self) -> Tensor:
        """log beta_tilde_t, its infinite first entry replaced by the second (as in iDDPM)."""
        variance = self.posterior_variance.clone()
        variance[0] = variance[1] if self.num_timesteps > 1 else self.betas[0]
        return variance.log()

    @_table
    def posterior_mean_coef_x0(self) -> Tensor:
        """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @_table
    def posterior_mean_coef_xt(self) -> Tensor:
        """Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        return (1 - self.alphas_cumprod_prev) * self.alphas.sqrt() / (1 - self.alphas_cumprod)

    def respaced(self, timesteps: Tensor) -> NoiseSchedule:
        """The schedule of the shorter process that visits only ``timesteps`` (int64, increasing).

        Its betas are 1 - abar_t / abar_prev over the visited steps (iDDPM, arXiv:2102.09672).
        """
        abar = self.alphas_cumprod[timesteps]
        previous = torch.cat([ONE, abar[:-1]])
        return NoiseSchedule(1 - abar / previous, name=f"{self.name}, respaced")


class FlowSchedule(GaussianPath):
    """x_t = (1 - s) x_0 + s eps at s = (t + 1) / T: the straight path of rectified flow.

    Liu et al. 2022, arXiv:2209.03003. By default the network gets T sigma_t as its time, as in
    Stable Diffusion 3: 1..T without a shift, else the shifted values. Training, samplers and
    :class:`fastdiff.sde.Straight` all use this label.

    Args:
        num_timesteps: T.
        shift: moves the timesteps towards more noise, s -> shift s / (1 + (shift - 1) s) (Esser et
            al. 2024, arXiv:2403.03206, eq. 23).
        label_by: the label that the network gets: "sigma" is T sigma_t; "timestep" is t in 0..T-1
            whatever the shift, for learned embeddings of T timesteps and for models trained before
            this option existed.

    Raises:
        ValueError: T below 1, a shift that is not positive, or an unknown ``label_by``.
    """

    def __init__(
        self, num_timesteps: int = 1000, shift: float = 1.0, *, label_by: str = "sigma"
    ) -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
        if label_by not in LABELS:
            raise ValueError(f"unknown label_by {label_by!r}, wanted one of {', '.join(LABELS)}")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be positive, got {shift}")
        self.shift, self.label_by = shift, label_by
        with _for_autograd():
            s = torch.arange(1, num_timesteps + 1, dtype=torch.float64, device="cpu")
            s = s / num_timesteps
            self.sigma_t = shift * s / (1 + (shift - 1) * s)
            self.alpha_t = (1 - s) / (1 + (shift - 1) * s)

    def __repr__(self) -> str:
        labels = "" if self.label_by == "sigma" else f", label_by={self.label_by!r}"
        return f"FlowSchedule(num_timesteps={self.num_timesteps}, shift={self.shift}{labels})"

    def levels(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma with alpha + sigma = 1 and sigma / alpha = ``ratio``."""
        return 1 / (1 + ratio), ratio / (1 + ratio)

    def label(self, t: Tensor, sigma: Tensor) -> Tensor:
        """T sigma, or t where ``label_by`` is "timestep"."""
        if self.labels_are_timesteps:
            return t
        # Rounded, since T (k / T) is not always the whole number k.
        return torch.round(self.num_timesteps * sigma, decimals=9)

    @property
    def labels_are_timesteps(self) -> bool:
        """Whether ``label_by`` is "timestep"."""
        return self.label_by == "timestep"

    def timestep(self, label: Tensor) -> Tensor:
        """T s - 1 with T times the shifted s as the label; or the label if it is a timestep."""
        if self.labels_are_timesteps:
            return label
        sigma = label / self.num_timesteps
        return self.num_timesteps * sigma / (self.shift - (self.shift - 1) * sigma) - 1
