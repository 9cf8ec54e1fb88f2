"""Score matching losses: denoising (continuous time, discrete sigmas), EDM's, and sliced.

Each returns one loss per image, [N] in float32 (float64 for float64 images). It is a mean over the
image's values, so that losses of different image sizes compare. Times are float64 [N].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.common.checks import beside, check_floating, wide_dtype
from fastdiff.common.model import Model
from fastdiff.losses.noising import noised, squared_error, values_of
from fastdiff.losses.prediction import image_mean, predict
from fastdiff.sde import EDM, SDE, LogSNR, Score

WEIGHTINGS = ("sigma", "likelihood")
LOG_MEAN, LOG_STD = -1.2, 1.2  # of sigma in EDM's training (Karras et al. 2022, table 1)
SMALLEST_SIGMA = 1e-15  # its square and the square of its inverse are finite and not 0 in float32


def denoising_score_matching(
    score: Score, sde: SDE, x0: Tensor, t: Tensor, noise: Tensor, *, weighting: str = "sigma"
) -> Tensor:
    """lambda(t) |score(x_t, t) + eps / sigma|^2 (Vincent 2011; Song et al. 2021, eq. 7).

    arXiv:2011.13456. The score of the marginal at t minimises it over all functions.

    Args:
        score: (x, t) -> like x, differentiable in its parameters; see ``fastdiff.sde.score_fn``.
        sde: the forward process.
        x0: clean images [N, ...], floating point.
        t: times [N], floating point, in 0..sde.end.
        noise: standard normal, like ``x0``; or seeds, int64 [N, 2], see ``noising``.
        weighting: "sigma" for lambda = sigma^2, the mean squared error of eps; "likelihood" for
            lambda = g^2, for which the loss bounds the likelihood (Song et al. 2021,
            arXiv:2101.09258, theorem 1).

    Raises:
        ValueError: an unknown weighting, shapes that do not fit, or times outside the range.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}, wanted one of {', '.join(WEIGHTINGS)}")
    t = sde.check_time(t, x0).expand(x0.shape[0])
    alpha, sigma = sde.levels(t)
    each = _row_of_each(x0)
    x_t = noised(x0, each, noise, *_tables(x0, alpha, sigma))
    level = sigma.clamp(min=SMALLEST_SIGMA)
    weight = level**2
    if weighting == "likelihood":
        weight = sde.rates(t)[1] * (level / sigma) ** 2
    return squared_error(score(x_t, t), x0, each, noise, None, *_tables(x0, -1 / level, weight))


def diffusion_loss(
    model: Model,
    sde: LogSNR,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    least_variance: bool = False,
    **cond: Any,
) -> Tensor:
    """-l'(t) |noise - model(x_t)|^2 / 2, the bound's diffusion loss in continuous time.

    Kingma et al. 2021, arXiv:2107.00630, eq. 17, l being the log-SNR. Unlike the other losses it is
    differentiable in the parameters of a :class:`fastdiff.sde.LearnedLogSNR`, too. Its mean over
    uniform t trains the network. That mean does not depend on l between its ends; the mean of its
    square does, and trains l, to the least variance of the estimate (appendix I.2).

    Args:
        model: the network, which predicts the noise: (x_t, label, **cond) -> like x_t.
        sde: the process.
        x0: clean images [N, ...], floating point.
        t: times [N], floating point, in 0..1, uniform.
        noise: standard normal, like ``x0``; or seeds, int64 [N, 2], see ``noising``.
        least_variance: one backward pass of the loss trains both: parameters of the process get the
            gradient of the squared loss, those of the network that of the loss.
        cond: keyword arguments of the model.

    Raises:
        ValueError: shapes that do not fit, or times outside the range.
    """
    noise = values_of(noise, x0)
    t = sde.check_time(t, x0).expand(x0.shape[0])
    log_snr, rate = sde.log_snr(t), sde.log_snr_rate(t)
    alpha, sigma = (beside(level, x0) for level in sde.levels_of(log_snr))
    x_t = (alpha * x0 + sigma * noise).to(x0.dtype)
    label = sde.label_of(log_snr).to(wide_dtype(x0.dtype))
    output, _ = predict(model, x_t, label, cond)
    error = image_mean((output - noise).square())
    loss = -rate.to(error.dtype) / 2 * error
    if least_variance and log_snr.requires_grad:
        # An image's loss depends on the process through these alone, and the gradient of its square
        # is 2 loss times that of the loss (appendix I.2).
        factor = 2 * loss.detach().double()
        for through in (log_snr, rate):
            through.register_hook(lambda gradient: factor * gradient)
    return loss


def edm_loss(
    model: Model, sde: EDM, x0: Tensor, sigma: Tensor, noise: Tensor, **cond: Any
) -> Tensor:
    """EDM's weighted error of the denoiser (Karras et al. 2022, arXiv:2206.00364, eq. 8, table 1).

    For the denoiser D = c_skip x + c_out F and the weight 1 / c_out^2 this is the squared error of
    the raw network F against a target of variance 1 at every sigma.

    Args:
        model: the raw network F: (c_in x, label, **cond) -> like x.
        sde: the process, which defines the preconditioning.
        x0: clean images [N, ...], floating point.
        sigma: noise levels [N], floating point, in 0..sde.end; see :func:`log_normal_sigma`.
        noise: standard normal, like ``x0``; or seeds, int64 [N, 2], see ``noising``.
        cond: keyword arguments of the model.

    Raises:
        ValueError: shapes that do not fit, or levels outside the range.
    """
    sigma = sde.check_time(sigma, x0).expand(x0.shape[0])
    skip, out, scale = sde.preconditioning(sigma)
    each = _row_of_each(x0)
    scaled = noised(x0, each, noise, *_tables(x0, scale, scale * sigma))
    (label,) = _tables(x0, sde.label(sigma))
    output, _ = predict(model, scaled, label, cond, narrow=True)
    # F's target, for which D is x_0: (x_0 - skip (x_0 + sigma noise)) / out
    target = _tables(x0, (1 - skip) / out, -skip * sigma / out, torch.ones_like(sigma))
    return squared_error(output, x0, each, noise, *target)


def log_normal_sigma(
    images: int,
    *,
    mean: float = LOG_MEAN,
    std: float = LOG_STD,
    generator: torch.Generator | None = None,
) -> Tensor:
    """EDM's noise levels for training: log sigma ~ N(mean, std^2) (Karras et al. 2022, table 1).

    Returns:
        float64 [images], on the generator's device.
    """
    device = torch.device("cpu") if generator is None else generator.device
    noise = torch.randn(images, generator=generator, dtype=torch.float64, device=device)
    return (mean + std * noise).exp()


def log_normal_quantiles(shares: Tensor, *, mean: float = LOG_MEAN, std: float = LOG_STD) -> Tensor:
    """The levels below which shares of those of :func:`log_normal_sigma` lie.

    Args:
        shares: floating point, in 0..1 without the ends.
        mean: of the logarithm of the levels.
        std: of the logarithm of the levels.
    """
    return (mean + std * torch.special.ndtri(shares)).exp()


def ncsn_loss(
    score: Callable[..., Tensor], x0: Tensor, sigma: Tensor, noise: Tensor, **cond: Any
) -> Tensor:
    """sigma^2 |score(x, sigma) + eps / sigma|^2 / 2 (Song & Ermon 2019, eq. 5 and 6).

    The loss of noise-conditional score networks, arXiv:1907.05600.

    Args:
        score: (x, sigma [N], **cond) -> the score of the data with noise sigma, like x.
        x0: clean images [N, ...], floating point.
        sigma: noise levels [N], positive; see :func:`geometric_sigmas`.
        noise: standard normal, like ``x0``; or seeds, int64 [N, 2], see ``noising``.
        cond: keyword arguments of ``score``.

    Raises:
        ValueError: shapes that do not fit, or levels that are not positive.
    """
    check_floating(x0, "x0")
    if sigma.shape != x0.shape[:1] or not bool((sigma > 0).all()):
        raise ValueError(f"sigma must be positive, of shape ({x0.shape[0]},), got {sigma}")
    level = sigma.double()
    each = _row_of_each(x0)
    x = noised(x0, each, noise, *_tables(x0, torch.ones_like(level), level))
    output = score(x, sigma, **cond)
    return squared_error(output, x0, each, noise, None, *_tables(x0, -1 / level, level**2 / 2))


def geometric_sigmas(largest: float, smallest: float, levels: int) -> Tensor:
    """Noise levels from the largest to the smallest in a geometric sequence, float64 [levels].

    Song & Ermon 2019, arXiv:1907.05600, section 4.

    Raises:
        ValueError: not largest > smallest > 0, or fewer than 2 levels.
    """
    if not largest > smallest > 0 or levels < 2:
        raise ValueError(
            f"wanted largest > smallest > 0 and 2 levels or more, got {largest}, {smallest} and "
            f"{levels}"
        )
    ends = math.log(largest), math.log(smallest)
    return torch.linspace(*ends, levels, dtype=torch.float64, device="cpu").exp()


def sliced_score_matching(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """v^T (d score / dx) v + |score|^2 / 2, v Rademacher (Song et al. 2019, eq. 8).

    arXiv:1905.07088, with the variance reduction of its section 4.3. It needs neither noise nor a
    known score: up to a constant its mean is half the squared distance between ``score`` and the
    score of x's own density.

    Args:
        score: x -> like x, twice differentiable if the loss is used for training.
        x: data [N, ...], floating point.
        probes: number of random directions v per image.
        generator: source of the directions, on x's device.

    Raises:
        ValueError: fewer than 1 probe.
    """
    check_floating(x, "x")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    x = x.detach().requires_grad_()
    output = score(x)
    curvature = torch.zeros(x.shape[0], dtype=wide_dtype(x.dtype), device=x.device)
    for _ in range(probes):
        signs = torch.empty_like(x).bernoulli_(0.5, generator=generator) * 2 - 1
        (along,) = torch.autograd.grad((output * signs).sum(), x, create_graph=True)
        curvature = curvature + image_mean((along * signs).to(curvature.dtype)) / probes
    return curvature + image_mean(output.to(curvature.dtype).square()) / 2


def _row_of_each(x0: Tensor) -> Tensor:
    """0..N-1: image i takes entry i of the tables of coefficients."""
    return torch.arange(x0.shape[0], device=x0.device)


def _tables(x0: Tensor, *values: Tensor) -> list[Tensor]:
    """Coefficients [N] on the device and in the wide dtype of the images, for the kernels."""
    return [value.to(x0.device, wide_dtype(x0.dtype)) for value in values]
