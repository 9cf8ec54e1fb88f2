"""k-diffusion's calling convention for the samplers of ``fastdiff.samplers``: one loop for all.

k-diffusion's images are x = x_0 + sigma eps. Its samplers get the levels sigma to visit, from noise
to image, and a model ``(x, sigma) -> denoised image``. That is a path with alpha = 1 whose
timesteps are the given levels, whose label of a timestep is sigma itself, and whose model predicts
x0. So a sampler of the registry makes its table for that path, and ``ops.sampler_step`` computes
each row.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops, samplers
from fastdiff.common.checks import wide_dtype
from fastdiff.common.inputs import is_real, kind_of
from fastdiff.common.model import Model, Output
from fastdiff.common.progress import progress_bar
from fastdiff.samplers import Sampler, grids
from fastdiff.samplers.churn import Churned
from fastdiff.schedules import GaussianPath

Callback = Callable[[dict[str, Any]], object]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]  # (level before, level after) -> standard noise

# What the levels and the denoiser already say. Consistency models are the exception: their options
# have a sigma_min of the model.
SETTLED = ("grid", "prediction", *grids.OPTIONS)


class SigmaPath(GaussianPath):
    """x = x_0 + sigma eps at chosen levels, which are also what the model is told.

    Args:
        sigmas: the level of each timestep, positive and increasing, float64 [T].
    """

    extends = True

    def __init__(self, sigmas: Tensor) -> None:
        self.alpha_t, self.sigma_t = torch.ones_like(sigmas), sigmas

    def levels(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """alpha = 1 and sigma = ratio."""
        return torch.ones_like(ratio), ratio

    def label(self, t: Tensor, sigma: Tensor) -> Tensor:
        """sigma, in place of the timestep."""
        return sigma


@torch.no_grad()
def denoise(
    name: str,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    noise_sampler: NoiseSampler | None = None,
    fewest: int = 1,
    **options: Any,
) -> Tensor:
    """Run a sampler of ``samplers.names()`` in k-diffusion's manner.

    Args:
        name: the sampler.
        model: ``(x, sigma [N], **extra_args)`` -> the denoised images, like x. Both of its tensors
            are the model's to keep: no later step overwrites them.
        x: images at the first level (for ddim-inverse at the last), [N, C, ...].
        sigmas: levels of noise [S + 1], decreasing; the last may be 0. On x's device or the CPU.
        extra_args: keyword arguments of the model.
        callback: called in each step, after the model's first evaluation, with a dict of ``x``,
            ``i`` (the step's number), ``sigma``, ``sigma_hat`` (after churn) and ``denoised``.
        disable: True for no progress bar, None for none unless standard error is a terminal.
        noise_sampler: gives noise of unit variance, like x; None for ``torch.randn_like``.
        fewest: the fewest steps for which the sampler makes a table. A shorter run is the end of
            such a run, whose first steps have lower orders.
        **options: of the sampler; ``clip`` is None if not given.

    Returns:
        The images at the last level (for ddim-inverse at the first), like x.

    Raises:
        TypeError: x or sigmas of the wrong kind, an option that the sampler does not have or that
            the levels settle, or a model's output that is no tensor.
        ValueError: sigmas of another shape, that do not decrease, are negative or not finite, or
            are on another device; an option out of its range; noise or an output unlike x.
    """
    levels = checked_levels(x, sigmas)
    settled = [key for key in options if key in SETTLED]
    if name == "consistency" and levels[-1] == 0:
        settled = [key for key in settled if key != "sigma_min"]
    if settled:
        raise TypeError(
            f"{name} has no option {', '.join(map(repr, settled))} here: the sigmas are the grid, "
            "and the model predicts the denoised image"
        )
    hashable = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    sampler = _sampler(name, levels, fewest, tuple(sorted(hashable.items())))
    if sampler.points[0].sigma < sampler.points[-1].sigma:
        sigmas = sigmas.flip(0)
    return run(sampler, model, x, sigmas, extra_args or {}, callback, disable, noise_sampler)


@lru_cache(maxsize=64)
def _sampler(
    name: str, levels: tuple[float, ...], fewest: int, options: tuple[tuple[str, Any], ...]
) -> Sampler:
    """A sampler that visits ``levels``, cached: a table costs as much as several small steps."""
    missing = max(fewest - (len(levels) - 1), 0)
    levels = (*(levels[0] * 2.0**k for k in range(missing, 0, -1)), *levels)
    positive, steps = [level for level in levels if level], len(levels) - 1
    path = SigmaPath(torch.tensor(positive[::-1], dtype=torch.float64, device="cpu"))
    last = len(positive) - 1
    sampler = samplers.make(
        name,
        path,
        steps,
        grid=[float(last - i) for i in range(steps)],
        final="sigma_min" if levels[-1] else "zero",
        prediction="x0",
        **{"clip": None, **dict(options)},
    )
    return sampler.starting_at(missing) if missing else sampler


def run(
    sampler: Sampler,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any],
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None,
) -> Tensor:
    """Run the table of a sampler of a :class:`SigmaPath`; see :func:`denoise`.

    Beside the model and the noise, a row costs two calls of the dispatcher: an empty tensor and the
    step. A row's result is a new tensor, since callbacks and models may keep the images they get.
    """
    table = sampler.table
    values, _, numbers = table.on(x.device, wide_dtype(x.dtype))
    told = table.timesteps.to(x.device, x.dtype).unsqueeze(1).repeat(1, len(x)).unbind()
    visited = table.timesteps.to(sigmas).unbind()
    given, steps, ends = sigmas.unbind(), table.steps.tolist(), table.ends_step
    begins, noisy, last = [True, *ends[:-1]], table.noisy, table.rows - 1
    if isinstance(sampler, Churned) and sampler.s_churn > 0:
        # Like k-diffusion, draw noise for every step, also where it is not used.
        x = _churned(x, table.levels[0, 1].item(), sampler.points[0].sigma)
        noisy = [end and row < last for row, end in enumerate(ends)]
    history = ops.new_history(x, table.depth) if table.depth else None
    wanted = Output(tuple(x.shape), x.dtype, f"images of shape {tuple(x.shape)}")
    shape, dtype, step, empty_like = x.shape, x.dtype, ops.sampler_step_for(x), torch.empty_like
    with progress_bar(total=table.num_steps, shown=bar_is_shown(disable)) as bar:
        for row, i in enumerate(steps):
            denoised = model(x, told[row], **extra_args)
            if type(denoised) is not Tensor or denoised.shape != shape or denoised.dtype != dtype:
                denoised = wanted.of(denoised)
            if callback is not None and begins[row]:
                sigma = {"sigma": given[i], "sigma_hat": visited[row]}
                callback({"x": x, "i": i, **sigma, "denoised": denoised})
            noise = None
            if noisy[row]:
                after = given[i + 1] if ends[row] else visited[row + 1]
                noise = like(x, noise_sampler, given[i], after)
            new = empty_like(x)
            step(x, denoised, history, noise, values, numbers[row], None, new)
            x = new
            if ends[row]:
                bar.update()
    return x


def like(x: Tensor, noise_sampler: NoiseSampler | None, before: Tensor, after: Tensor) -> Tensor:
    """Noise for a step between two levels, of x's shape, dtype and device.

    Raises:
        TypeError: the noise sampler returned no tensor.
        ValueError: it returned one of another shape.
    """
    if noise_sampler is None:
        return torch.randn_like(x)
    noise = noise_sampler(before, after)
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise_sampler must return a tensor, got {type(noise).__name__}")
    if noise.shape != x.shape:
        raise ValueError(
            f"noise_sampler must return noise of shape {tuple(x.shape)}, got {tuple(noise.shape)}"
        )
    return noise.to(x)


def checked_levels(x: Tensor, sigmas: Tensor) -> tuple[float, ...]:
    """The levels as numbers, which waits for their device; see :func:`denoise` for the errors."""
    check_noisy_images(x)
    if not is_real(sigmas):
        raise TypeError(f"sigmas must be a floating point tensor, got {kind_of(sigmas)}")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sigmas must have shape [S + 1] with at least one step, got {tuple(sigmas.shape)}"
        )
    if sigmas.device.type != "cpu" and sigmas.device != x.device:
        raise ValueError(
            f"sigmas must be on x's device, {x.device}, or on the CPU, got {sigmas.device}"
        )
    levels = tuple(sigmas.tolist())
    if not all(after < before for before, after in pairwise(levels)):  # also refuses NaN
        raise ValueError(f"sigmas must decrease from noise to image, got {list(levels)}")
    if not (levels[-1] >= 0 and levels[0] < math.inf):
        raise ValueError(f"sigmas must be finite and not negative, got {list(levels)}")
    return levels


def check_noisy_images(x: Tensor) -> None:
    """TypeError or ValueError unless x is floating point [N, C, ...]."""
    if not is_real(x):
        raise TypeError(f"x must be a floating point tensor, got {kind_of(x)}")
    if x.ndim < 2:
        raise ValueError(f"x must have shape [N, C, ...], got {tuple(x.shape)}")


def bar_is_shown(disable: bool | None) -> bool:
    """Whether there is a progress bar: as tqdm, whose ``disable=None`` asks for a terminal."""
    if disable is None:
        return bool(getattr(sys.stderr, "isatty", lambda: False)())
    return not disable


def _churned(x: Tensor, level: float, before: float) -> Tensor:
    """x with the noise that the first step begins with; the noise is drawn even if it is zero."""
    noise = torch.randn_like(x)
    variance = level**2 - before**2
    return torch.add(x, noise, alpha=math.sqrt(variance)) if variance > 0 else x
