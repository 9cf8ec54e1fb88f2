"""The forward process, its posterior, and the parametrisations of a network's prediction.

The functions broadcast a timestep ``t``, int64 of shape [N], against images of shape [N, ...],
compute in float32 (float64 for float64 images) and return images in the dtype of their input. A
timestep outside 0..T-1 is an IndexError, a wrong dtype a TypeError, a wrong shape a ValueError.
A network may predict any of ``KINDS``; all are linear in (x_0, eps) given x_t:

    eps    the noise                       x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps
    x0     the clean image
    v      sqrt(abar) eps - sqrt(1 - abar) x_0     (Salimans & Ho 2022, arXiv:2202.00512)
    score  grad log q(x_t | x_0) = -eps / sqrt(1 - abar)   (Song et al. 2021, arXiv:2011.13456)
    flow   eps - x_0                                       (Liu et al. 2022, arXiv:2209.03003)

On a path other than DDPM's, read alpha_t for sqrt(abar) and sigma_t for sqrt(1 - abar).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.common.checks import (
    beside,
    check_floating,
    check_shape,
    check_timesteps,
    wide_dtype,
)
from fastdiff.schedules import GaussianPath, NoiseSchedule

KINDS = ("eps", "x0", "v", "score", "flow")


def q_sample(schedule: GaussianPath, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Sample x_t ~ q(x_t | x_0) with the given noise (DDPM eq. 4).

    Args:
        schedule: the noise schedule, T steps.
        x0: clean images, [N, ...], floating point.
        t: timesteps, int64 [N], in 0..T-1.
        noise: standard normal noise, like ``x0``.

    Returns:
        x_t, with the shape, dtype and memory format of ``x0``.
    """
    return ops.q_sample(x0, t, noise, *schedule.coefficients(x0.device, wide_dtype(x0.dtype)))


def q_transition(schedule: NoiseSchedule, x_prev: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [N, ...] and variance [N, 1, ...] of q(x_t | x_{t-1}) (DDPM eq. 2)."""
    mean = _at(schedule.alphas.sqrt(), t, x_prev) * x_prev
    return mean.to(x_prev.dtype), _at(schedule.betas, t, x_prev)


def q_marginal(schedule: GaussianPath, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [N, ...] and variance [N, 1, ...] of q(x_t | x_0) (DDPM eq. 4)."""
    mean = _at(schedule.alpha_t, t, x0) * x0
    return mean.to(x0.dtype), _at(schedule.sigma_t**2, t, x0)


def q_posterior(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [N, ...], variance and clipped log-variance [N, 1, ...] of q(x_{t-1} | x_t, x_0).

    DDPM eq. 6 and 7. At t = 0 the variance is 0, so its log-variance is replaced by t = 1's.
    """
    check_shape(x0, x_t, "x0")
    mean = (
        _at(schedule.posterior_mean_coef_x0, t, x_t) * x0
        + _at(schedule.posterior_mean_coef_xt, t, x_t) * x_t
    )
    return (
        mean.to(x_t.dtype),
        _at(schedule.posterior_variance, t, x_t),
        _at(schedule.posterior_log_variance_clipped, t, x_t),
    )


def velocity(schedule: GaussianPath, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022, arXiv:2202.00512)."""
    check_shape(noise, x0, "noise")
    signal, sigma = (
        _at(table, t, x0) for table in schedule.coefficients(x0.device, wide_dtype(x0.dtype))
    )
    return (signal * noise - sigma * x0).to(x0.dtype)


def target(
    schedule: GaussianPath, x0: Tensor, t: Tensor, noise: Tensor, kind: str = "eps"
) -> Tensor:
    """The training target of a network that predicts ``kind``, in the shape and dtype of ``x0``.

    Raises:
        ValueError: unknown kind.
    """
    check_kind(kind)
    if kind == "eps":
        return noise
    if kind == "x0":
        return x0
    if kind == "v":
        return velocity(schedule, x0, t, noise)
    if kind == "flow":
        return noise - x0
    return (-noise / _at(schedule.sigma_t, t, x0)).to(x0.dtype)


def conversion(schedule: GaussianPath, kind: str, wanted: str) -> tuple[Tensor, Tensor]:
    """Coefficients a, b of wanted_t = a_t x_t + b_t prediction_t, float64 [T].

    Args:
        schedule: the noise schedule, T steps.
        kind: the kind of the prediction, one of :data:`KINDS`.
        wanted: the kind to convert to. Where alpha is 0, the coefficients that give x0, v or flow
            from eps or score are not finite.

    Raises:
        ValueError: unknown kind.
    """
    return conversion_at(kind, wanted, schedule.alpha_t, schedule.sigma_t)


LinearForm = tuple[Tensor, Tensor]  # the coefficients a, b of a x_t + b prediction


def conversion_at(kind: str, wanted: str, alpha: Tensor, sigma: Tensor) -> LinearForm:
    """:func:`conversion` at given coefficients alpha and sigma, float64 of any shape."""
    check_kind(kind)
    check_kind(wanted)
    if kind == wanted:
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    x0, eps = x0_and_eps(kind, alpha, sigma)
    if wanted == "x0":
        return x0
    if wanted == "eps":
        return eps
    if wanted == "v":
        return alpha * eps[0] - sigma * x0[0], alpha * eps[1] - sigma * x0[1]
    if wanted == "flow":
        return eps[0] - x0[0], eps[1] - x0[1]
    return -eps[0] / sigma, -eps[1] / sigma


def x0_and_eps(kind: str, alpha: Tensor, sigma: Tensor) -> tuple[LinearForm, LinearForm]:
    """x_0 and eps as linear forms a x_t + b prediction.

    Args:
        kind: the kind of the prediction, one of :data:`KINDS`.
        alpha: coefficient of x_0 in x_t, float64 of any shape.
        sigma: coefficient of eps in x_t, float64 of the same shape.

    Returns:
        (a, b) for x_0, and (a, b) for eps.
    """
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "eps":
        return (1 / alpha, -sigma / alpha), (zero, one)
    if kind == "x0":
        return (zero, one), (1 / sigma, -alpha / sigma)
    if kind == "score":
        return (1 / alpha, sigma**2 / alpha), (zero, -sigma)
    if kind == "v":
        power = alpha**2 + sigma**2  # 1 on a variance-preserving path
        return (alpha / power, -sigma / power), (sigma / power, alpha / power)
    total = alpha + sigma  # flow; 1 on a straight path
    return (1 / total, -sigma / total), (1 / total, alpha / total)


def to_x0(
    schedule: GaussianPath, x_t: Tensor, t: Tensor, prediction: Tensor, kind: str = "eps"
) -> Tensor:
    """The clean image that a prediction of ``kind`` implies, shape and dtype of ``x_t``.

    Raises:
        ValueError: unknown kind, or eps or score at a timestep with zero signal.
    """
    return _convert(schedule, x_t, t, prediction, kind, "x0")


def to_eps(
    schedule: GaussianPath, x_t: Tensor, t: Tensor, prediction: Tensor, kind: str = "eps"
) -> Tensor:
    """The noise that a prediction of ``kind`` implies, shape and dtype of ``x_t``.

    Raises:
        ValueError: unknown kind.
    """
    return _convert(schedule, x_t, t, prediction, kind, "eps")


def to_v(
    schedule: GaussianPath, x_t: Tensor, t: Tensor, prediction: Tensor, kind: str = "eps"
) -> Tensor:
    """The velocity that a prediction of ``kind`` implies, shape and dtype of ``x_t``.

    Raises:
        ValueError: unknown kind, or eps or score at a timestep with zero signal.
    """
    return _convert(schedule, x_t, t, prediction, kind, "v")


def to_score(
    schedule: GaussianPath, x_t: Tensor, t: Tensor, prediction: Tensor, kind: str = "eps"
) -> Tensor:
    """The score grad log q(x_t | x_0) that a prediction implies, shape and dtype of ``x_t``.

    Raises:
        ValueError: unknown kind.
    """
    return _convert(schedule, x_t, t, prediction, kind, "score")


def to_flow(
    schedule: GaussianPath, x_t: Tensor, t: Tensor, prediction: Tensor, kind: str = "eps"
) -> Tensor:
    """The flow eps - x_0 that a prediction of ``kind`` implies, shape and dtype of ``x_t``.

    Raises:
        ValueError: unknown kind, or eps or score at a timestep with zero signal.
    """
    return _convert(schedule, x_t, t, prediction, kind, "flow")


def check_kind(kind: str) -> None:
    """Raise ValueError unless ``kind`` is one of :data:`KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"unknown prediction kind {kind!r}, wanted one of {', '.join(KINDS)}")


def _convert(
    schedule: GaussianPath, x_t: Tensor, t: Tensor, prediction: Tensor, kind: str, wanted: str
) -> Tensor:
    check_shape(prediction, x_t, "prediction")
    a, b = (_at(factor, t, x_t) for factor in conversion(schedule, kind, wanted))
    if kind == wanted:
        return prediction
    if (
        kind in ("eps", "score")
        and wanted in ("x0", "v", "flow")
        and schedule.has_zero_terminal_snr
        and bool((t == schedule.num_timesteps - 1).any())
    ):
        raise ValueError(
            f"a prediction of {kind} says nothing of x0 at zero signal-to-noise ratio "
            f"(t = {schedule.num_timesteps - 1}); predict x0, v or flow instead"
        )
    return (a * x_t + b * prediction).to(x_t.dtype)


def linear(form: LinearForm, x: Tensor, y: Tensor) -> Tensor:
    """a x + b y for images x and y and coefficients [N] or [], in the wide dtype of x."""
    return beside(form[0], x) * x + beside(form[1], x) * y


def _at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """table[t] as [N, 1, ...] to broadcast with x, in float32 or float64.

    A product with half-precision images is then computed in the table's dtype.
    """
    check_floating(x, "images")
    check_timesteps(t, x, table.numel())
    return beside(table.to(x.device)[t], x)
