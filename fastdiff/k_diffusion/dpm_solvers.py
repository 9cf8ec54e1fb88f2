"""k-diffusion's DPM-Solver between two levels: with steps known beforehand, and adaptive ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.common.checks import wide_dtype
from fastdiff.common.errors import StuckError
from fastdiff.common.inputs import check_choice, whole_number
from fastdiff.common.model import Model, Output
from fastdiff.common.progress import progress_bar
from fastdiff.k_diffusion.denoising import (
    Callback,
    NoiseSampler,
    bar_is_shown,
    check_noisy_images,
    denoise,
    like,
)
from fastdiff.k_diffusion.sigma_grids import get_ancestral_step
from fastdiff.samplers.dpm_solver import stage_weights
from fastdiff.samplers.exponential import NOISE_PREDICTION
from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import check_amounts

# The smallest step of an adaptive run, and the distance from the end at which it has arrived, both
# in log sigma.
ARRIVED = 1e-5


def sample_dpm_fast(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver-fast (Lu et al. 2022, arXiv:2206.00927, section 3.4), to a level above zero.

    Args:
        model: ``(x, sigma [N], **extra_args)`` -> the denoised images, like x.
        x: images at ``sigma_max``, [N, C, ...].
        sigma_min: the last level.
        sigma_max: the first.
        n: evaluations of the model, in n // 3 + 1 steps.
        extra_args: keyword arguments of the model.
        callback: called in each step with a dict of ``x``, ``i``, ``sigma``, ``sigma_hat``, ``t``
            and ``t_up`` (both -log sigma) and ``denoised``.
        disable: whether to show no progress bar; None shows one on a terminal.
        eta: share of the ancestral noise, in [0, 1].
        s_noise: standard deviation of the noise.
        noise_sampler: gives the noise of a step; None for ``torch.randn_like``.

    Raises:
        TypeError: n is no whole number, or another argument is of the wrong kind.
        ValueError: n below 1, not 0 < sigma_min < sigma_max, or another value out of its range.
    """
    if whole_number(n, "n") < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    check_noisy_images(x)
    first, last = _log_levels(sigma_min, sigma_max)
    ends = torch.linspace(first, last, n // 3 + 2, dtype=torch.float64, device="cpu").neg().exp()
    sigmas = ends.to(x.device, wide_dtype(x.dtype))

    def with_times(info: dict[str, Any]) -> None:
        assert callback is not None
        t = -info["sigma"].log()
        callback({**info, "t": t, "t_up": t})

    return denoise(
        "dpm-fast", model, x, sigmas, extra_args, callback and with_times, disable,
        noise_sampler=noise_sampler, evaluations=n, eta=eta, s_noise=s_noise,
    )  # fmt: skip


@torch.no_grad()
def sample_dpm_adaptive(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
) -> Any:
    """DPM-Solver-12 or -23: steps to a tolerance (Lu et al. 2022, arXiv:2206.00927, appendix C).

    A step is taken in two orders; their difference, over the whole batch, is its error, and the
    images of higher order are kept. A rejected step does not evaluate the model at its start again.
    Each step waits for the device.

    Args:
        model: ``(x, sigma [N], **extra_args)`` -> the denoised images, like x.
        x: images at ``sigma_max``, [N, C, ...].
        sigma_min: the last level.
        sigma_max: the first.
        extra_args: keyword arguments of the model.
        callback: called after each step, accepted or not, with a dict of ``x``, ``i``, ``sigma``
            and ``sigma_hat`` (where x is), ``t`` and ``t_up`` (-log of it), ``denoised`` (from the
            step's start), ``error``, ``h`` (the next step in log sigma) and the counts.
        disable: whether to show no progress bar; None shows one on a terminal.
        order: the higher order, 2 or 3.
        rtol: tolerance relative to the images.
        atol: absolute tolerance.
        h_init: the first step in log sigma.
        pcoeff: proportional coefficient of the step size's controller.
        icoeff: its integral coefficient.
        dcoeff: its derivative coefficient.
        accept_safety: a step is accepted if the controller shrinks the next one to no less than
            this share.
        eta: share of the ancestral noise, in [0, 1].
        s_noise: standard deviation of the noise.
        noise_sampler: gives the noise of a step; None for ``torch.randn_like``.
        return_info: also return the counts.

    Returns:
        The images; with ``return_info`` a pair of them and a dict of ``steps``, ``nfe`` (model
        evaluations), ``n_accept`` and ``n_reject``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an order other than 2 and 3, not 0 < sigma_min < sigma_max, tolerances or a
            first step that are not positive, or another value out of its range.
        FloatingPointError: the model's output is not finite.
        StuckError: the tolerance asks for steps below 1e-5 in log sigma.
    """
    check_noisy_images(x)
    check_choice("order", order, (2, 3))
    check_amounts(eta=eta, s_noise=s_noise)
    for name, value in (("rtol", rtol), ("atol", atol), ("h_init", h_init)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    t, end = _log_levels(sigma_min, sigma_max)
    step = _Step(model, x, {} if extra_args is None else extra_args, order)
    control = _Controller(h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    before = x  # the images of lower order after the last accepted step
    with progress_bar(shown=bar_is_shown(disable)) as bar:
        while t < end - ARRIVED:
            tried = min(end, t + control.h)
            if control.h < ARRIVED:
                raise StuckError(
                    f"at sigma = {math.exp(-t):g} a step of {control.h:g} in log sigma is too "
                    f"small: take a larger tolerance than rtol {rtol:g}, atol {atol:g}"
                )
            down, up = tried, 0.0
            if eta:
                level, _ = get_ancestral_step(math.exp(-t), math.exp(-tried), eta)
                down = min(end, -math.log(level)) if level > 0 else end
                up = math.sqrt(max(math.exp(-2 * tried) - math.exp(-2 * down), 0.0))
            calls = step.evaluations
            low, high, denoised = step.of(x, t, down)
            scale = (rtol * torch.maximum(low.abs(), before.abs())).clamp_(min=atol)
            error = torch.linalg.vector_norm((low - high) / scale).item() / x.numel() ** 0.5
            if not math.isfinite(error):
                raise FloatingPointError(
                    f"the model's output is not finite at sigma = {math.exp(-t):g} or within a "
                    f"step of {down - t:g} in log sigma from there"
                )
            accepted = control.accepts(error)
            if accepted:
                before, x = low, high
                if up:
                    a, b = (x.new_tensor(math.exp(-each)) for each in (t, tried))
                    x = torch.add(x, like(x, noise_sampler, a, b), alpha=up * s_noise)
                t = tried
                step.forget()
            info["n_accept" if accepted else "n_reject"] += 1
            info["nfe"] += step.evaluations - calls
            info["steps"] += 1
            bar.update(step.evaluations - calls)
            if callback is not None:
                at, sigma = x.new_tensor(t), x.new_tensor(math.exp(-t))
                callback({
                    "x": x, "i": info["steps"] - 1, "t": at, "t_up": at, "sigma": sigma,
                    "sigma_hat": sigma, "denoised": denoised, "error": x.new_tensor(error),
                    "h": control.h, **info,
                })  # fmt: skip
    return (x, info) if return_info else x


class _Step:
    """DPM-Solver steps from one place in two orders, which share their evaluations of the model.

    Args:
        model: the denoiser.
        x: images like those to come.
        extra_args: keyword arguments of the model.
        order: the higher order, 2 or 3.
    """

    def __init__(self, model: Model, x: Tensor, extra_args: Mapping[str, Any], order: int) -> None:
        self.model, self.extra_args, self.order = model, extra_args, order
        self.wanted = Output(tuple(x.shape), x.dtype, f"images of shape {tuple(x.shape)}")
        self.evaluations = 0
        self.start: tuple[Tensor, Tensor] | None = None  # eps and denoised at the start

    def of(self, x: Tensor, t: float, end: float) -> tuple[Tensor, Tensor, Tensor]:
        """The images at ``end`` in the lower and in the higher order, and those predicted at t.

        Both are -log sigma. Order 3 has its stages at thirds of the step, order 2 at its middle
        (algorithms 1 and 2); the lower order uses the first stages of the higher one.
        """
        if self.start is None:
            self.start = self._predicted(x, t)
        eps, denoised = self.start
        points = [_point(t + (end - t) * j / self.order) for j in range(self.order + 1)]
        predictions = [eps]
        for j in range(1, self.order):
            inner = self._moved(x, predictions, points[: j + 1], self.order)
            predictions.append(self._predicted(inner, -math.log(points[j].sigma))[0])
        lower = [*points[: self.order - 1], points[-1]]
        low = self._moved(x, predictions[:-1], lower, self.order - 1)
        return low, self._moved(x, predictions, points, self.order), denoised

    def forget(self) -> None:
        """The next step starts from other images."""
        self.start = None

    def _moved(
        self, x: Tensor, predictions: list[Tensor], points: list[Point], size: int
    ) -> Tensor:
        """x, which is at the first of ``points``, at the last of them; alpha is 1."""
        *known, target = points
        weights = stage_weights(NOISE_PREDICTION, known, target, size)
        for weight, eps in zip(weights, predictions, strict=False):
            if weight:
                x = torch.add(x, eps, alpha=weight)
        return x

    def _predicted(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """eps and the denoised images."""
        sigma = math.exp(-t)
        denoised = self.wanted.of(self.model(x, x.new_full((len(x),), sigma), **self.extra_args))
        self.evaluations += 1
        return (x - denoised) / sigma, denoised


class _Controller:
    """A PID controller of step sizes, as k-diffusion's.

    A step's size is multiplied by f = 1 + atan(e_0^b_1 e_1^b_2 e_2^b_3 - 1), e_0, e_1 and e_2 being
    the inverse errors of this step and the last two accepted ones, b_1 = (P + I + D) / k,
    b_2 = -(P + 2 D) / k and b_3 = D / k.

    Args:
        h: the first step size.
        proportional: P.
        integral: I.
        derivative: D.
        order: k.
        accept_safety: the smallest f with which a step is accepted.
    """

    def __init__(
        self,
        h: float,
        proportional: float,
        integral: float,
        derivative: float,
        order: float,
        accept_safety: float,
    ) -> None:
        self.h, self.accept_safety = h, accept_safety
        self.powers = (
            (proportional + integral + derivative) / order,
            -(proportional + 2 * derivative) / order,
            derivative / order,
        )
        self.past: tuple[float, float] | None = None

    def accepts(self, error: float) -> bool:
        """Whether a step with this error is accepted; sets the size of the next one."""
        inverse = 1 / (error + 1e-8)
        past = self.past or (inverse, inverse)
        factor = math.prod(e**b for e, b in zip((inverse, *past), self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        self.h *= factor
        accepted = factor >= self.accept_safety
        if accepted or self.past is None:
            self.past = (inverse, past[0])
        return accepted


def _point(t: float) -> Point:
    """The point with alpha = 1 at t = -log sigma."""
    return Point(t, 1.0, math.exp(-t))


def _log_levels(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """-log of the first and the last level."""
    low, high = float(sigma_min), float(sigma_max)
    if not 0 < low < high < math.inf:
        raise ValueError(f"wanted 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    return -math.log(high), -math.log(low)
