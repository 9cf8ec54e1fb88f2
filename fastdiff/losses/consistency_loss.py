"""Consistency models: networks that jump from any x_t to the image at once.

The consistency function f(x_t, t) is the image at the end of the probability-flow ODE through x_t,
so it is the same all along the ODE's path, and f(x, 0) = x (Song et al. 2023, arXiv:2303.01469).
A network learns it by agreeing with itself at neighbouring timesteps t > s. ``samplers.make`` has
``consistency`` and ``lcm`` to sample from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.common.checks import beside, check_shape, wide_dtype
from fastdiff.common.model import Model
from fastdiff.losses.jumps import check_falls, levels
from fastdiff.losses.noising import noised
from fastdiff.losses.prediction import check_x0, image_mean, predict
from fastdiff.process import LinearForm, check_kind, conversion, linear
from fastdiff.schedules import GaussianPath

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
HUBER = 0.00054  # c of arXiv:2310.14189, eq. 8, over the root of the number of values


def prediction_form(path: GaussianPath, kind: str = "x0") -> LinearForm:
    """f = a_t x_t + b_t output for a network that predicts ``kind``: f is its x_0, float64 [T].

    For v, flow and score f(x, 0) is nearly x by itself, since sigma_0 is small. It is the form that
    ``samplers.make("consistency", ..., prediction=kind)`` samples.

    Raises:
        ValueError: unknown kind.
    """
    check_kind(kind)
    return conversion(path, kind, "x0")


def karras_form(path: GaussianPath, sigma_data: float = 0.5) -> LinearForm:
    """f = c_skip x_t / alpha_t + c_out output, for which f(x, 0) is x, float64 [T].

    With r = sigma / alpha, c_skip = s^2 / ((r - r_0)^2 + s^2) and c_out = s (r - r_0) /
    sqrt(r^2 + s^2) (arXiv:2303.01469, appendix C). It is the form that
    ``samplers.make("consistency", ..., sigma_data=s)`` samples.

    Args:
        path: with signal at every timestep.
        sigma_data: s, the standard deviation of the images.

    Raises:
        ValueError: s that is not positive.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")
    ratio = path.sigma_t / path.alpha_t
    above = ratio - ratio[0]
    skip = sigma_data**2 / (above**2 + sigma_data**2)
    return skip / path.alpha_t, sigma_data * above / (ratio**2 + sigma_data**2).sqrt()


def lcm_form(path: GaussianPath, kind: str = "eps", timestep_scaling: float = 10.0) -> LinearForm:
    """f = c_skip x_t + c_out x_0 of latent consistency models, float64 [T].

    With u = timestep_scaling t and s = 0.5, c_skip = s^2 / (u^2 + s^2) and
    c_out = u / sqrt(u^2 + s^2) (Luo et al. 2023, arXiv:2310.04378). It is the form that
    ``samplers.make("lcm", ...)`` samples.

    Args:
        path: the path of the noised images.
        kind: what the network predicts.
        timestep_scaling: see ``fastdiff.samplers.consistency.LCM``.

    Raises:
        ValueError: unknown kind.
    """
    of_x, of_output = prediction_form(path, kind)
    u = timestep_scaling * torch.arange(path.num_timesteps, dtype=torch.float64, device="cpu")
    skip, out = 0.25 / (u**2 + 0.25), u / (u**2 + 0.25).sqrt()
    return skip + out * of_x, out * of_output


def consistency_loss(
    path: GaussianPath,
    model: Model,
    target: Model,
    x0: Tensor,
    t: Tensor,
    s: Tensor,
    noise: Tensor,
    *,
    form: LinearForm,
    teacher: Step | None = None,
    huber: float = HUBER,
    **cond: Any,
) -> Tensor:
    """The distance of f(x_t, t) from the target's f(x_s, s), s < t, of each image, [N].

    Without a teacher, x_s has the noise of x_t: consistency training, unbiased as s approaches t
    (arXiv:2303.01469, theorem 2). With a teacher, x_s is what its step makes of x_t: consistency
    distillation (algorithm 2).

    The distance is the pseudo-Huber one of Song & Dhariwal 2023 (arXiv:2310.14189, eq. 7), with the
    mean over the image's D values in place of their sum: sqrt(mean d^2 + c^2) - c.

    Args:
        path: the path of the noised images.
        model: the network in training, (x_t, label, **cond) -> output.
        target: what it is to agree with: the network itself (2310.14189) or its running average
            (2303.01469). No gradient flows through it.
        x0: clean images, [N, C, ...], floating point.
        t: int64 [N], in 0..T-1.
        s: int64 [N], below ``t``, in -1..T-1. At -1 the target is the image itself.
        noise: standard normal noise, like ``x0``; or seeds, int64 [N, 2], see ``noising``.
        form: f as a linear form of x_t and the output, tables float64 [T]: :func:`karras_form`,
            :func:`lcm_form` or :func:`prediction_form`.
        teacher: (x_t, t, s) -> x_s, a step of the probability-flow ODE, such as
            ``jumps.ddim_jump`` with a trained network, perhaps guided; it sees the wide dtype.
        huber: c, at least 0; 0 is the root of the mean square.
        **cond: keyword arguments of both networks.

    Returns:
        float32 (float64 for float64 images), [N]. Weights such as 1 / (r_t - r_s), r = sigma /
        alpha (2310.14189, section 3.5), are the caller's.

    Raises:
        TypeError, ValueError, IndexError: images, timesteps or outputs that do not fit; huber
            below 0.
    """
    check_x0(x0)
    check_falls(t, s, "s")
    if not huber >= 0:
        raise ValueError(f"huber must be at least 0, got {huber}")
    wide = wide_dtype(x0.dtype)
    coefficients = path.coefficients(x0.device, wide)
    x_t = noised(x0, t, noise, *coefficients)

    def f(network: Model, x: Tensor, at: Tensor) -> Tensor:
        output, _ = predict(network, x, path.labels_of(at, wide), cond)
        of_x, of_output = (table.to(at.device)[at] for table in form)
        return linear((of_x, of_output), x, output)

    with torch.no_grad():
        there = s.clamp(min=0)
        if teacher is None:
            x_s = noised(x0, there, noise, *coefficients)
            clean = x0.to(wide)
        else:
            x_s = teacher(x_t.to(wide), t, s)
            check_shape(x_s, x0, "the teacher's images")
            clean = x_s
        wanted = f(target, x_s.to(x0.dtype), there)
        wanted = torch.where(beside(s, x0) < 0, clean.to(wanted.dtype), wanted)
    apart = image_mean((f(model, x_t, t) - wanted).square())
    return (apart + huber**2).sqrt() - huber if huber else _root(apart)


def discretized_log_normal(
    path: GaussianPath, timesteps: Tensor, mean: float = -1.1, std: float = 2.0
) -> Tensor:
    """The probability of training at each of the intervals of a grid, float64 [S - 1].

    The probability that a log-normal noise level lies in the interval, normalised (Song & Dhariwal
    2023, arXiv:2310.14189, eq. 10 and table 1).

    Args:
        path: with signal at every timestep of the grid.
        timesteps: int64 [S], rising.
        mean: of log(sigma / alpha).
        std: of log(sigma / alpha).

    Raises:
        ValueError: fewer than two timesteps, or not rising.
    """
    if len(timesteps) < 2:
        raise ValueError(f"a grid has at least two timesteps, got {timesteps.tolist()}")
    check_falls(timesteps[1:], timesteps[:-1], "timesteps")
    alpha, sigma = levels(path, timesteps)
    edges = torch.erf(((sigma / alpha).log() - mean) / (math.sqrt(2) * std))
    probabilities = edges.diff()
    return probabilities / probabilities.sum()


def intervals_at(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """How many intervals the grid of a consistency training has at a step: it doubles in stages.

    min(first 2^floor(step / K), last), K = floor(steps / (log2(last / first) + 1)) (Song & Dhariwal
    2023, arXiv:2310.14189, section 3.4).

    Args:
        step: 0..steps - 1.
        steps: total number of steps.
        first: intervals at first.
        last: intervals at last, first times a power of two.

    Raises:
        ValueError: a step outside its range, or not 1 <= first <= last.
    """
    if not 0 <= step < steps or not 1 <= first <= last:
        raise ValueError(
            f"wanted 0 <= step < steps and 1 <= first <= last, got {step}, {steps}, {first}, {last}"
        )
    stage = max(1, steps // (int(math.log2(last / first)) + 1))
    return min(first * 2 ** (step // stage), last)


def _root(square: Tensor) -> Tensor:
    """The root of a mean square, with the gradient 0 where it is 0."""
    return torch.where(square > 0, square, 1).sqrt() * (square > 0)
