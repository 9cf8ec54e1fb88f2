"""k-diffusion's samplers under its own names, with its own signatures and defaults.

Frontends read these signatures to see which options a sampler has, so none is hidden behind
``**options``. Every sampler takes, before its options,

    model        (x [N, C, ...], sigma [N], **extra_args) -> the denoised images, like x
    x            images at the first level of noise, floating point
    sigmas       the levels [S + 1], decreasing; the last may be 0
    extra_args   keyword arguments of the model
    callback     called in each step with a dict of x, i, sigma, sigma_hat and denoised
    disable      whether to show no progress bar; None shows one on a terminal

and raises the errors of ``fastdiff.k_diffusion.denoising.denoise``. Of the options ``eta`` is the
strength of the noise, ``s_noise`` its standard deviation, and ``noise_sampler(sigma, sigma_next)``
gives it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdiff.common.model import Model
from fastdiff.k_diffusion.brownian_tree import BrownianTreeNoiseSampler
from fastdiff.k_diffusion.denoising import Callback, NoiseSampler, checked_levels, denoise

Arguments = Mapping[str, Any] | None


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method with churn (Karras et al. 2022, arXiv:2206.00364, algorithm 2)."""
    return denoise(
        "euler", model, x, sigmas, extra_args, callback, disable,
        s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise,
    )  # fmt: skip


def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Euler's method with ancestral noise; ``eta`` in [0, 1]."""
    return denoise(
        "euler-ancestral", model, x, sigmas, extra_args, callback, disable,
        noise_sampler=noise_sampler, eta=eta, s_noise=s_noise,
    )  # fmt: skip


def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method with churn (Karras et al. 2022, arXiv:2206.00364, algorithm 2)."""
    return denoise(
        "heun", model, x, sigmas, extra_args, callback, disable,
        s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise,
    )  # fmt: skip


def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver-2 with churn, two evaluations a step (Lu et al. 2022, arXiv:2206.00927)."""
    return denoise(
        "kdpm-2", model, x, sigmas, extra_args, callback, disable,
        s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise,
    )  # fmt: skip


def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver-2 with ancestral noise; ``eta`` in [0, 1]."""
    return denoise(
        "dpm-2-ancestral", model, x, sigmas, extra_args, callback, disable,
        noise_sampler=noise_sampler, eta=eta, s_noise=s_noise,
    )  # fmt: skip


def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """The linear multistep method in sigma, of ``order`` 1 to 4."""
    return denoise("lms", model, x, sigmas, extra_args, callback, disable, order=order)


def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++(2S) with ancestral noise; ``eta`` in [0, 1]."""
    return denoise(
        "dpmpp-2s-ancestral", model, x, sigmas, extra_args, callback, disable,
        noise_sampler=noise_sampler, eta=eta, s_noise=s_noise,
    )  # fmt: skip


def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 0.5,
) -> Tensor:
    """DPM-Solver++ for the SDE, two evaluations a step, the second at the share ``r`` of it.

    Noise is that of a Brownian path if there is no ``noise_sampler``. Both stages take their noise
    from it as it is, however their noises are correlated.
    """
    noise_sampler = noise_sampler or _brownian(x, sigmas)
    return denoise(
        "dpmpp-sde", model, x, sigmas, extra_args, callback, disable,
        noise_sampler=noise_sampler, eta=eta, s_noise=s_noise, r=r, shared_noise=False,
    )  # fmt: skip


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2)."""
    return denoise(
        "dpmpp-2m", model, x, sigmas, extra_args, callback, disable,
        fewest=2, lower_order_final=False,
    )  # fmt: skip


def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, appendix B).

    ``solver_type`` is midpoint or heun. Noise is that of a Brownian path if there is no
    ``noise_sampler``.
    """
    noise_sampler = noise_sampler or _brownian(x, sigmas)
    return denoise(
        "dpmpp-2m-sde", model, x, sigmas, extra_args, callback, disable,
        noise_sampler=noise_sampler, fewest=2, eta=eta, s_noise=s_noise, solver_type=solver_type,
        lower_order_final=False,
    )  # fmt: skip


def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Arguments = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """SDE-DPM-Solver++ over three values, with k-diffusion's weight of the second difference.

    Noise is that of a Brownian path if there is no ``noise_sampler``.
    """
    noise_sampler = noise_sampler or _brownian(x, sigmas)
    return denoise(
        "dpmpp-3m-sde", model, x, sigmas, extra_args, callback, disable,
        noise_sampler=noise_sampler, fewest=3, eta=eta, s_noise=s_noise, solver_type="k-diffusion",
        lower_order_final=False,
    )  # fmt: skip


def _brownian(x: Tensor, sigmas: Tensor) -> NoiseSampler:
    """A Brownian path between the last level above zero and the first."""
    levels = checked_levels(x, sigmas)
    return BrownianTreeNoiseSampler(x, levels[-1] or levels[-2], levels[0])
