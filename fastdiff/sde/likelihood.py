"""Exact likelihoods by the instantaneous change of variables along the probability-flow ODE.

    log p(x) = log prior(z) + integral of div v(x_t, t) dt from ``start`` to ``end``,
    v(x, t) = f x - g^2 score / 2

where z is where x arrives at ``end`` (Song et al. 2021, arXiv:2011.13456, eq. 39 and 40; Grathwohl
et al. 2019, arXiv:1810.01367, for the trace). p is the density that the ODE gives the images at
``start``, the smallest time that the network was trained at. The integral runs beside x, with step
sizes for each image that hold both to the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.common.checks import check_like
from fastdiff.sde.processes import SDE
from fastdiff.sde.score import Score
from fastdiff.sde.solvers.ode import IndexedScore, integrate_along, score_of_rows
from fastdiff.sde.solvers.rounding import MAX_EVALUATIONS
from fastdiff.sde.solvers.runge_kutta import rms
from fastdiff.sde.solvers.stepping import check_count, check_images

MAX_EXACT = 4096  # dimensions: the exact trace costs as many backward passes a step


@dataclass(frozen=True)
class Likelihood:
    """Log densities of images, and what they took.

    Attributes:
        logp: log density in nats, float64 [N].
        z: where the images arrive, like them.
        evaluations: of the score, int64 [N] on the CPU; each comes with a backward pass for every
            probe, or for every dimension.
    """

    logp: Tensor
    z: Tensor
    evaluations: Tensor


def log_likelihood(
    score: Score | IndexedScore,
    sde: SDE,
    x: Tensor,
    *,
    start: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str = "dopri5",
    trace: str = "hutchinson",
    probes: int = 1,
    seed: int = 0,
    max_evaluations: int = MAX_EVALUATIONS,
    conditioned: bool = False,
    progress: bool = True,
) -> Likelihood:
    """Log densities of images under the model that the score defines.

    States and integrals are float64; the score is given images in their dtype. Its derivatives are
    taken with respect to the images alone, also where gradients are switched off.

    Args:
        score: ``(x [M, ...], t float64 [M])`` -> grad log p_t(x), like x, differentiable in x.
        sde: the forward process.
        x: images [N, ...], floating point; dequantised, if they were 8-bit ones.
        start: the time at which x is taken to stand, None for ``sde.trained_from``. The noise there
            should be small beside the finest structure of the images, whose density it blurs.
        rtol: relative tolerance of a step; None for what suits the dtype of x, 1e-5 in float64,
            1e-4 in float32, 1e-3 in float16, 1e-2 in bfloat16.
        atol: absolute tolerance of a step, in nats for the integral; None likewise.
        method: see :func:`fastdiff.sde.solvers.runge_kutta.integrate`.
        trace: "hutchinson", an unbiased estimate from random signs, which stay the same during the
            whole solve; or "exact", with a backward pass for every dimension.
        probes: sign vectors an image; the estimate's variance falls as 1 / probes.
        seed: image i draws its signs from seed + i, whatever else is in the batch. A later batch of
            the same data goes on with seed + number of images before it.
        max_evaluations: of the score, for any one image.
        conditioned: as in :func:`fastdiff.sde.solvers.ode.solve_ode`.
        progress: show a bar.

    Raises:
        ValueError: an unknown trace, "exact" with more than 4096 dimensions, less than one probe,
            a start outside 0..sde.end, or a score that has no derivative.
        TypeError, ValueError, FloatingPointError, StuckError: as ``integrate`` does.
    """
    check_images(x, "x")
    size = x[0].numel() if len(x) else math.prod(x.shape[1:])
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"unknown trace {trace!r}, wanted hutchinson or exact")
    if trace == "exact" and size > MAX_EXACT:
        raise ValueError(
            f"the exact trace takes a backward pass for every dimension, at most {MAX_EXACT}, and "
            f"images of shape {tuple(x.shape[1:])} have {size}; use trace='hutchinson'"
        )
    start = sde.trained_from if start is None else start
    if not 0 < start < sde.end:
        raise ValueError(f"start must lie between 0 and {sde.end:g}, got {start}")
    signs = None if trace == "exact" else _signs(x, check_count(probes, "probes"), seed)

    def field(state: Tensor, t: Tensor, index: Tensor) -> Tensor:
        images = state[:, :-1].reshape(-1, *x.shape[1:]).to(x.dtype)
        asked = score_of_rows(score, conditioned, index)
        found, divergence = _with_divergence(
            asked, images, t, None if signs is None else signs[index]
        )
        f, squared = sde.rates(sde.check_time(t, images))
        drift = f[:, None] * state[:, :-1] - squared[:, None] / 2 * found.double().flatten(1)
        return torch.cat([drift, (f * size - squared / 2 * divergence)[:, None]], 1)

    # Inference mode would keep the score from being differentiated; a clone made here may be.
    with torch.inference_mode(False):
        begin = torch.cat([x.double().flatten(1), x.new_zeros(len(x), 1).double()], 1)
        solved = integrate_along(
            sde, field, begin, start, sde.end, rtol=rtol, atol=atol, method=method,
            max_evaluations=max_evaluations, norm=_norm, dtype=x.dtype, progress=progress,
        )  # fmt: skip
    z = solved.x[:, :-1].reshape(x.shape)
    return Likelihood(sde.prior_logp(z) + solved.x[:, -1], z.to(x.dtype), solved.evaluations)


def bits_per_dim(logp: Tensor, shape: tuple[int, ...], *, offset: float = 7.0) -> Tensor:
    """-logp / (D ln 2) + offset, float64: the bits that a lossless code takes for a value.

    Args:
        logp: log densities in nats, of any shape.
        shape: of one image, D values in all.
        offset: log2 of the levels in one unit of the data. In -1..1, 256 levels are 128 = 2^7 a
            unit, so that a density there is 2^7 times that on levels 1 apart; for data in 0..1 it
            is 8.

    Raises:
        ValueError: a shape without values.
    """
    size = math.prod(shape)
    if size < 1:
        raise ValueError(f"wanted the shape of one image, got {tuple(shape)}")
    return -logp.double() / (size * math.log(2)) + offset


def dequantize(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """8-bit images as continuous ones in [-1, 1]: level k becomes (k + u) / 128 - 1, u uniform.

    A density of the result bounds the probability of the levels from below (Theis et al. 2016,
    arXiv:1511.01844, section 3.1); a density of the levels themselves could be made infinite.

    Args:
        x: levels, uint8, or images k / 127.5 - 1, float32 or float64, which are rounded to the
            nearest level.
        generator: source of u.

    Returns:
        Images, float32 for levels and like x otherwise.

    Raises:
        TypeError: another dtype: half precision cannot hold what lies between two levels.
        ValueError: images outside [-1, 1].
    """
    if x.dtype not in (torch.uint8, torch.float32, torch.float64):
        raise TypeError(f"x must be uint8, float32 or float64, got {x.dtype}")
    levels = x.double()
    if x.dtype != torch.uint8:
        if not bool((levels.abs() <= 1).all()):
            raise ValueError(
                f"images must lie in [-1, 1], got values from {x.min().item():g} to "
                f"{x.max().item():g}"
            )
        levels = ((levels + 1) * 127.5).round()
    where = x.device if generator is None else generator.device
    u = torch.rand(x.shape, generator=generator, device=where, dtype=torch.float64).to(x.device)
    return ((levels + u) / 128 - 1).to(torch.float32 if x.dtype == torch.uint8 else x.dtype)


def _norm(scaled: Tensor) -> Tensor:
    """The larger of the image's error and the integral's, which one of thousands would hide."""
    return torch.maximum(rms(scaled[:, :-1]), scaled[:, -1].abs())


def _signs(x: Tensor, probes: int, seed: int) -> Tensor:
    """Rademacher vectors int8 [N, probes, ...] on x's device."""
    generator = torch.Generator()
    drawn = torch.empty(len(x), probes, *x.shape[1:], dtype=torch.int8, device="cpu")
    for i, one in enumerate(drawn):
        one.random_(2, generator=generator.manual_seed(seed + i))
    return drawn.mul_(2).sub_(1).to(x.device)


def _with_divergence(
    score: Score, x: Tensor, t: Tensor, signs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The score and the sum of its diagonal derivatives, float64 [M]."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        found = score(x, t)
    check_like(found, x, "the score", "x")
    if not found.requires_grad:
        raise ValueError("the score has no derivative in x: was it computed without gradients?")

    def pulled(vector: Tensor) -> Tensor:
        return torch.autograd.grad(found, x, vector, retain_graph=True)[0]

    if signs is None:
        return found.detach(), _exact(pulled, x)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for probe in signs.unbind(1):
        vector = probe.to(x.dtype)
        total += (pulled(vector) * vector).flatten(1).double().sum(1)
    return found.detach(), total / signs.shape[1]


def _exact(pulled: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One backward pass a dimension; functions without rules for batched gradients will do."""
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    unit = torch.zeros_like(x, memory_format=torch.contiguous_format).flatten(1)
    for d in range(unit.shape[1]):
        unit.zero_()[:, d] = 1
        total += pulled(unit.view(x.shape)).flatten(1)[:, d].double()
    return total
