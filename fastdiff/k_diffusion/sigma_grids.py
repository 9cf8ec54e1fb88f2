"""Levels of noise for k-diffusion's samplers, and the small formulas that its users call."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fastdiff.common.inputs import whole_number
from fastdiff.samplers import grids

Level = TypeVar("Level", float, Tensor)
Device = torch.device | str


def append_zero(x: Tensor) -> Tensor:
    """``x`` [S] with a zero behind it, [S + 1]."""
    return torch.cat([x, x.new_zeros(1)])


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Device = "cpu"
) -> Tensor:
    """Levels evenly spaced to the power 1 / rho (Karras et al. 2022, arXiv:2206.00364, eq. 5).

    Args:
        n: levels above zero, from ``sigma_max`` to ``sigma_min``.
        sigma_min: the smallest of them.
        sigma_max: the largest.
        rho: the exponent.
        device: where the result is.

    Returns:
        The levels and a zero behind them, [n + 1] in torch's default dtype.

    Raises:
        TypeError: n is no whole number.
        ValueError: n below 1, not 0 < sigma_min < sigma_max, or rho that is not positive.
    """
    return _to_zero("karras", n, sigma_min, sigma_max, rho, device)


def get_sigmas_exponential(
    n: int, sigma_min: float, sigma_max: float, device: Device = "cpu"
) -> Tensor:
    """Levels evenly spaced in log sigma; arguments and errors of :func:`get_sigmas_karras`."""
    return _to_zero("exponential", n, sigma_min, sigma_max, None, device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Device = "cpu"
) -> Tensor:
    """Levels whose log is a polynomial: log sigma falls with (1 - i / (n - 1))^rho.

    Arguments and errors are those of :func:`get_sigmas_karras`; rho = 1 is
    :func:`get_sigmas_exponential`.
    """
    return _to_zero("polyexponential", n, sigma_min, sigma_max, rho, device)


def get_sigmas_vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    device: Device = "cpu",
) -> Tensor:
    """Levels sigma / alpha of the variance-preserving SDE at even times.

    sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1 (Karras et al. 2022, arXiv:2206.00364, table 1).

    Args:
        n: levels above zero.
        beta_d: by how much beta grows from time 0 to time 1.
        beta_min: beta at time 0.
        eps_s: the last time; the first is 1.
        device: where the result is.

    Returns:
        The levels and a zero behind them, [n + 1] in torch's default dtype.

    Raises:
        TypeError: n is no whole number.
        ValueError: n below 1.
    """
    t = torch.linspace(1, eps_s, _checked_count(n), dtype=torch.float64, device="cpu")
    sigmas = torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()
    return append_zero(sigmas).to(device, torch.get_default_dtype())


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx/dsigma of the probability-flow ODE (Karras et al. 2022, arXiv:2206.00364, eq. 1 and 3).

    Args:
        x: images [N, C, ...].
        sigma: their level of noise, [N] or [].
        denoised: the predicted images, like ``x``.
    """
    return (x - denoised) / sigma.view(*sigma.shape, *[1] * (x.ndim - sigma.ndim))


def get_ancestral_step(
    sigma_from: Level, sigma_to: Level, eta: float = 1.0
) -> tuple[Level, Level | float]:
    """The level to step down to, and the standard deviation of the noise to add then.

    The two give ``sigma_to`` together: down^2 + up^2 = sigma_to^2. With ``eta`` = 1 the noise is
    that of DDPM's posterior (Ho et al. 2020, arXiv:2006.11239, eq. 7) of x / alpha.

    Args:
        sigma_from: the level at which the step begins, above ``sigma_to``.
        sigma_to: the level at which it ends.
        eta: factor of the noise; 0 for none.
    """
    if not eta:
        return sigma_to, 0.0
    up = min(sigma_to, eta * sigma_to * (1 - sigma_to**2 / sigma_from**2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up


def _to_zero(
    name: str, n: int, low: float, high: float, rho: float | None, device: Device
) -> Tensor:
    levels = grids.ratios(name, _checked_count(n), float(low), float(high), rho)
    return torch.tensor([*levels, 0.0], dtype=torch.get_default_dtype(), device=device)


def _checked_count(n: int) -> int:
    if whole_number(n, "n") < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return n
