"""Exact likelihoods by the instantaneous change of variables along the probability-flow ODE.

    log p(x) = log prior(z) + integral of div v(x_t, t) dt from ``start`` to ``end``,
    v(x, t) = f x - g^2 score / 2

with z the solution of the ODE at ``end`` (Song et al. 2021, arXiv:2011.13456, eq. 39 and 40;
Grathwohl et al. 2019, arXiv:1810.01367, for the trace). p is the density that the ODE gives the
images at ``start``, by default the smallest time that the network was trained at. The integral and
x are solved together; step sizes are chosen per image so that both meet the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.common.checks import check_like
from fastdiff.common.inputs import check_choice
from fastdiff.sde.processes import SDE
from fastdiff.sde.score import Score
from fastdiff.sde.solvers.ode import IndexedScore, integrate_along, score_of_rows
from fastdiff.sde.solvers.rounding import MAX_EVALUATIONS
from fastdiff.sde.solvers.runge_kutta import rms
from fastdiff.sde.solvers.stepping import check_count, check_images

PROBE_TYPES = ("rademacher", "gaussian")
MAX_EXACT_DIMENSIONS = 4096  # the exact trace takes one backward pass per dimension


@dataclass(frozen=True)
class Likelihood:
    """Log densities of images, and the cost of computing them.

    Attributes:
        logp: log density in nats, float64 [N].
        z: the noise at ``end`` that the ODE maps the images to, like the images.
        evaluations: number of score evaluations for each image, int64 [N] on the CPU; an evaluation
            includes one backward pass per probe, or per dimension with the exact trace.
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
    probe_type: str = "rademacher",
    seed: int = 0,
    max_evaluations: int = MAX_EVALUATIONS,
    conditioned: bool = False,
    progress: bool = True,
) -> Likelihood:
    """Log densities of images under the model that the score defines.

    States and integrals are float64; the score gets images in the dtype of ``x``. Its derivatives
    with respect to the images are also taken where gradients are switched off.

    Args:
        score: ``(x [M, ...], t float64 [M])`` -> grad log p_t(x), like x, differentiable in x.
        sde: the forward process.
        x: images [N, ...], floating point; 8-bit images must be dequantised, see
            :func:`dequantize`.
        start: the time that x is assigned to, None for ``sde.trained_from``. Noise blurs the
            density, so the noise at ``start`` should be small beside the images' finest structure.
        rtol: relative tolerance of a step. None depends on the dtype of x: 1e-5 for float64, 1e-4
            for float32, 1e-3 for float16, 1e-2 for bfloat16.
        atol: absolute tolerance of a step, for the integral in nats; None as for ``rtol``.
        method: see :func:`fastdiff.sde.solvers.runge_kutta.integrate`.
        trace: "hutchinson", an unbiased estimate from random vectors, the probes, which stay the
            same during the whole solve; or "exact", with a backward pass for every dimension.
        probes: number of probes per image; the estimate's variance is proportional to 1 / probes.
        probe_type: "rademacher", random signs, or "gaussian", standard normal values. For a
            Jacobian J with the symmetric part S, a probe's variance is twice the sum of the squares
            of S's elements with normal values, and without those on the diagonal with signs.
        seed: the probes of image i come from seed + i, whatever else is in the batch. For a later
            batch of the same data, pass seed + number of images before it.
        max_evaluations: limit of score evaluations for any one image.
        conditioned: see :func:`fastdiff.sde.solvers.ode.solve_ode`.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: an unknown trace or probe_type, "exact" with more than 4096 dimensions, less
            than one probe, a start outside 0..sde.end, or a score that has no derivative.
        TypeError, ValueError, FloatingPointError, StuckError: the errors of ``integrate``.
    """
    check_images(x, "x")
    check_choice("probe_type", probe_type, PROBE_TYPES)
    size = x[0].numel() if len(x) else math.prod(x.shape[1:])
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"unknown trace {trace!r}, wanted hutchinson or exact")
    if trace == "exact" and size > MAX_EXACT_DIMENSIONS:
        raise ValueError(
            "the exact trace takes a backward pass for every dimension, at most "
            f"{MAX_EXACT_DIMENSIONS}, and images of shape {tuple(x.shape[1:])} have {size}; use "
            "trace='hutchinson'"
        )
    start = sde.trained_from if start is None else start
    if not 0 < start < sde.end:
        raise ValueError(f"start must lie between 0 and {sde.end:g}, got {start}")
    vectors = None
    if trace == "hutchinson":
        vectors = _random_probes(x, check_count(probes, "probes"), probe_type, seed)

    def field(state: Tensor, t: Tensor, index: Tensor) -> Tensor:
        images = state[:, :-1].reshape(-1, *x.shape[1:]).to(x.dtype)
        score_here = score_of_rows(score, conditioned, index)
        gradient, divergence = _with_divergence(
            score_here, images, t, None if vectors is None else vectors[index]
        )
        f, squared = sde.rates(sde.check_time(t, images))
        drift = f[:, None] * state[:, :-1] - squared[:, None] / 2 * gradient.double().flatten(1)
        return torch.cat([drift, (f * size - squared / 2 * divergence)[:, None]], 1)

    # Inference mode forbids derivatives, also later of tensors made in it: leave it, and clone.
    with torch.inference_mode(False):
        begin = torch.cat([x.double().flatten(1), x.new_zeros(len(x), 1).double()], 1)
        solved = integrate_along(
            sde, field, begin, start, sde.end, rtol=rtol, atol=atol, method=method,
            max_evaluations=max_evaluations, norm=_norm, dtype=x.dtype, progress=progress,
        )  # fmt: skip
    z = solved.x[:, :-1].reshape(x.shape)
    return Likelihood(sde.prior_logp(z) + solved.x[:, -1], z.to(x.dtype), solved.evaluations)


def bits_per_dim(logp: Tensor, shape: tuple[int, ...], *, offset: float = 7.0) -> Tensor:
    """-logp / (D ln 2) + offset, float64: the bits per value of a lossless code.

    Args:
        logp: log densities in nats, of any shape.
        shape: shape of one image, D values in all.
        offset: log2 of the number of 8-bit levels in one unit of the data: 7 for data in -1..1,
            where 256 levels are 128 = 2^7 per unit, and 8 for data in 0..1.

    Raises:
        ValueError: a shape without values.
    """
    size = math.prod(shape)
    if size < 1:
        raise ValueError(f"wanted the shape of one image, got {tuple(shape)}")
    return -logp.double() / (size * math.log(2)) + offset


def dequantize(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """8-bit images as continuous ones in [-1, 1]: level k becomes (k + u) / 128 - 1, u uniform.

    The expected log density of the result is a lower bound on the log probability of the levels
    (Theis et al. 2016, arXiv:1511.01844, section 3.1). A density of the levels themselves has no
    upper limit.

    Args:
        x: levels, uint8, or images k / 127.5 - 1, float32 or float64, which are rounded to the
            nearest level.
        generator: source of u, None for PyTorch's global generator.

    Returns:
        Images, float32 for uint8 levels, else of the dtype of x.

    Raises:
        TypeError: another dtype; half precision is too coarse for values between two levels.
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
    """The larger of the image's and the integral's error; a mean over both would hide the latter.

    Args:
        scaled: errors over their tolerances, [M, D + 1], the integral's last.
    """
    return torch.maximum(rms(scaled[:, :-1]), scaled[:, -1].abs())


def _random_probes(x: Tensor, probes: int, probe_type: str, seed: int) -> Tensor:
    """Probes [N, probes, ...] on x's device: signs int8, or normal values of x's dtype."""
    generator = torch.Generator()
    signs = probe_type == "rademacher"
    shape, dtype = (len(x), probes, *x.shape[1:]), torch.int8 if signs else torch.float32
    vectors = torch.empty(shape, dtype=dtype, device="cpu")
    for i, of_image in enumerate(vectors):
        generator.manual_seed(seed + i)
        if signs:
            of_image.random_(2, generator=generator)
        else:
            of_image.normal_(generator=generator)
    return vectors.mul_(2).sub_(1).to(x.device) if signs else vectors.to(x)


def _with_divergence(
    score: Score, x: Tensor, t: Tensor, probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The score, like x, and its divergence in x, float64 [M], exact if ``probes`` is None."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        gradient = score(x, t)
    check_like(gradient, x, "the score", "x")
    if not gradient.requires_grad:
        raise ValueError("the score has no derivative in x: was it computed without gradients?")

    def vector_jacobian_product(vector: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, x, vector, retain_graph=True)[0]

    if probes is None:
        return gradient.detach(), _exact_trace(vector_jacobian_product, x)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for probe in probes.unbind(1):
        vector = probe.to(x.dtype)
        total += (vector_jacobian_product(vector) * vector).flatten(1).double().sum(1)
    return gradient.detach(), total / probes.shape[1]


def _exact_trace(vector_jacobian_product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The trace of a Jacobian by one backward pass per dimension, float64 [M].

    It does not batch the passes, since not every operation has a rule for batched gradients.
    """
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    unit = torch.zeros_like(x, memory_format=torch.contiguous_format).flatten(1)
    for d in range(unit.shape[1]):
        unit.zero_()[:, d] = 1
        total += vector_jacobian_product(unit.view(x.shape)).flatten(1)[:, d].double()
    return total
