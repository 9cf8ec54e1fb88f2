"""Noise schedules by formula: each function makes the betas of T timesteps, in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdiff.schedules.gaussian_path import ONE, FlowSchedule, NoiseSchedule


def linear(
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    *,
    rescaled: bool = False,
) -> NoiseSchedule:
    """Linearly increasing betas (DDPM, arXiv:2006.11239, section 4).

    Args:
        num_timesteps: T. The default betas are made for T = 1000: with T = 200 the last abar is
            0.13 and with T = 50 it is 0.6, far from the noise that sampling starts from.
        beta_start: the first beta.
        beta_end: the last beta.
        rescaled: multiply the betas by 1000 / T and clamp them to 0.999, so that any T >= 2 ends
            in noise as T = 1000 does. OpenAI's and lucidrains' code does so, diffusers does not.

    Raises:
        ValueError: T below 1, or not 0 < beta_start <= beta_end < 1.
    """
    _check(num_timesteps, beta_start, beta_end)
    betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64, device="cpu")
    return _from_betas("linear", betas, beta_start, beta_end, rescaled)


def scaled_linear(
    num_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    *,
    rescaled: bool = False,
) -> NoiseSchedule:
    """Betas whose square roots increase linearly (latent diffusion, arXiv:2112.10752).

    The arguments and errors are those of :func:`linear`.
    """
    _check(num_timesteps, beta_start, beta_end)
    roots = torch.linspace(
        beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64, device="cpu"
    )
    return _from_betas("scaled_linear", roots**2, beta_start, beta_end, rescaled)


def cosine(num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """abar follows a squared cosine (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17).

    Args:
        num_timesteps: T.
        s: offset that keeps the first betas from being too small.
        max_beta: upper limit of the betas.

    Raises:
        ValueError: T below 1, or not 0 < max_beta < 1.
    """
    _check(num_timesteps, max_beta=max_beta)
    u = torch.arange(num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps
    abar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    betas = (1 - abar[1:] / abar[:-1]).clamp(max=max_beta)
    return NoiseSchedule(betas, name="cosine", options={"s": s, "max_beta": max_beta})


def shifted_cosine(
    num_timesteps: int = 1000,
    image_size: int = 64,
    base_size: int = 64,
    log_snr_max: float = 15.0,
    log_snr_min: float = -15.0,
) -> NoiseSchedule:
    """The cosine's log-SNR, lowered by 2 log(image_size / base_size) (simple diffusion).

    Hoogeboom et al. 2023, arXiv:2301.11093, section 3.1. Neighbouring pixels of a large image say
    the same, so that an average over them sees more signal. The shift gives the average of a large
    image the noise that suits an image of ``base_size``. With the two sizes equal it is the cosine
    between the two limits: abar = cos(angle)^2 with an angle that is even in t.

    Args:
        num_timesteps: T.
        image_size: side of the images in pixels.
        base_size: side of images for which the cosine is right without a shift.
        log_snr_max: log(abar / (1 - abar)) at t = 0 before the shift.
        log_snr_min: the same after the last timestep.

    Raises:
        ValueError: T or a size below 1, log-SNR limits that are not finite or do not fall, or T so
            small that a step loses all signal.
    """
    _check(num_timesteps)
    if min(image_size, base_size) < 1:
        raise ValueError(f"image sizes must be at least 1, got {image_size} and {base_size}")
    if not -math.inf < log_snr_min < log_snr_max < math.inf:
        raise ValueError(
            f"wanted finite log_snr_max > log_snr_min, got {log_snr_max} and {log_snr_min}"
        )
    first, last = (math.atan(math.exp(-value / 2)) for value in (log_snr_max, log_snr_min))
    u = torch.arange(1, num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps
    log_snr = -2 * torch.tan(first + u * (last - first)).log()
    abar = torch.sigmoid(log_snr - 2 * math.log(image_size / base_size))
    options = {
        "image_size": image_size,
        "base_size": base_size,
        "log_snr_max": log_snr_max,
        "log_snr_min": log_snr_min,
    }
    return NoiseSchedule(1 - abar / _before(abar), name="shifted_cosine", options=options)


def sigmoid_betas(
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    *,
    rescaled: bool = False,
) -> NoiseSchedule:
    """Betas that follow a logistic curve over [-6, 6] (GeoDiff, arXiv:2203.02923).

    The arguments and errors are those of :func:`linear`. diffusers calls this schedule "sigmoid".
    """
    _check(num_timesteps, beta_start, beta_end)
    curve = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64, device="cpu").sigmoid()
    betas = curve * (beta_end - beta_start) + beta_start
    return _from_betas("sigmoid_betas", betas, beta_start, beta_end, rescaled)


sigmoid = sigmoid_betas  # the name in earlier versions


def sigmoid_abar(
    num_timesteps: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
) -> NoiseSchedule:
    """abar falls from 1 to 0 along a logistic curve (Jabri et al. 2022, arXiv:2212.11972).

    With u = t / T, abar = (s(end) - s(start + u (end - start))) / (s(end) - s(start)) and s(z) =
    1 / (1 + exp(-z / tau)). It keeps more signal at both ends than the cosine, and lucidrains' code
    calls it "sigmoid".

    Args:
        num_timesteps: T.
        start: place on the curve at u = 0.
        end: place on the curve at u = 1.
        tau: width of the curve; a smaller one falls faster in the middle.
        max_beta: upper limit of the betas, since abar ends at 0.

    Raises:
        ValueError: T below 1, not start < end, tau not positive, or not 0 < max_beta < 1.
    """
    _check(num_timesteps, max_beta=max_beta)
    if not (-math.inf < start < end < math.inf and 0 < tau < math.inf):
        raise ValueError(f"wanted start < end and tau > 0, got {start}, {end} and {tau}")
    u = torch.arange(num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps
    curve = torch.sigmoid((start + u * (end - start)) / tau)
    abar = (curve[-1] - curve) / (curve[-1] - curve[0])
    betas = (1 - abar[1:] / abar[:-1]).clamp(max=max_beta)
    options = {"start": start, "end": end, "tau": tau, "max_beta": max_beta}
    return NoiseSchedule(betas, name="sigmoid_abar", options=options)


def flow(num_timesteps: int = 1000, shift: float = 1.0, *, label_by: str = "sigma") -> FlowSchedule:
    """The straight path of rectified flow: see :class:`FlowSchedule`."""
    return FlowSchedule(num_timesteps, shift, label_by=label_by)


def rescale_zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Shift and scale sqrt(abar) so that the last step holds no signal (arXiv:2305.08891, alg. 1).

    Train and sample the result with a prediction of x0, v or flow: where abar = 0, eps and score do
    not determine x_0.

    Raises:
        ValueError: fewer than 2 timesteps.
    """
    if schedule.num_timesteps < 2:
        raise ValueError("zero terminal SNR needs at least 2 timesteps, got 1")
    root = schedule.sqrt_alphas_cumprod
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root**2
    options = {**schedule.options, "zero_terminal_snr": True}
    return NoiseSchedule(
        1 - abar / _before(abar), name=schedule.name, options=options,
        rescale_timesteps=schedule.rescale_timesteps,
    )  # fmt: skip


def rescale_timesteps(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule of a network that is told 1000 t / T in place of the timestep t.

    Networks for schedules of other lengths then get labels of the same range, and the same
    label for about the same share of the way to noise. OpenAI's improved-diffusion and
    guided-diffusion have this as an option of the same name. Training, samplers, bounds and the
    view in continuous time all use the label. A learned embedding has a row for each whole number,
    so it needs a T that divides 1000.
    """
    return NoiseSchedule(
        schedule.betas, name=schedule.name, options=schedule.options, rescale_timesteps=True
    )


def _before(abar: Tensor) -> Tensor:
    """abar_{t-1} at every timestep, with abar_{-1} = 1."""
    return torch.cat([ONE, abar[:-1]])


def _from_betas(
    name: str, betas: Tensor, beta_start: float, beta_end: float, rescaled: bool
) -> NoiseSchedule:
    """The schedule of ``betas``, multiplied by 1000 / T if ``rescaled``."""
    options: dict[str, Any] = {"beta_start": beta_start, "beta_end": beta_end}
    if rescaled:
        options["rescaled"] = True
        betas = (betas * (1000 / betas.numel())).clamp(max=0.999)
    return NoiseSchedule(betas, name=name, options=options)


def _check(
    num_timesteps: int, beta_start: float = 0.5, beta_end: float = 0.5, max_beta: float = 0.5
) -> None:
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"wanted 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    if not 0 < max_beta < 1:
        raise ValueError(f"wanted 0 < max_beta < 1, got {max_beta}")
