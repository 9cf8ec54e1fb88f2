"""Warnings if the process does not end in noise, from which sampling starts.

If x = alpha x_0 + sigma eps still holds an image at the last timestep, the model has never seen the
pure noise that sampling gives it there: samples are too dark, too bright or worse (Lin et al. 2023,
arXiv:2305.08891). Training, and sampling from noise, warn of this when they start.
"""

from __future__ import annotations

import sys
import warnings

from fastdiff.samplers import Sampler, Table
from fastdiff.schedules import GaussianPath

# Largest image share in the variance of x (abar on DDPM's path) at the last timestep without a
# warning. Stable Diffusion's process has 0.0047, DDPM's 4e-5.
MAX_SHARE_AT_THE_END = 0.01
# Largest image share where a run begins, on a process that does end in noise. Some grids of few
# steps leave the last timesteps out: a leading grid of one step begins at timestep 0.
MAX_SHARE_AT_THE_BEGINNING = 0.5


def warn_of_image_at_the_end(path: GaussianPath) -> None:
    """UserWarning if the last timestep of a path still holds an image.

    There is no warning for processes that do not scale images, such as VE and EDM: their sigma_max
    is chosen for the data.
    """
    share = _share_at_the_end(path)
    if share > MAX_SHARE_AT_THE_END:
        _warn(
            f"{path!r} never reaches noise: at its last timestep abar is {share:.3g}, so that "
            f"{share:.0%} of the variance of x is still the image's, but sampling starts from pure "
            "noise. Take betas scaled to the number of timesteps, as in schedules.linear(T, "
            "rescaled=True), schedules.cosine(T), schedules.rescale_zero_terminal_snr with a "
            "prediction of x0 or v, or an SDE of larger beta_max"
        )


def warn_of_image_at_the_beginning(sampler: Sampler | Table) -> None:
    """UserWarning if a run from noise begins where x still holds an image.

    There is no warning for a run from an image to noise, or for a sampler whose first steps were
    left out.
    """
    table = sampler.table if isinstance(sampler, Sampler) else sampler
    (alpha, sigma), (_, last) = table.levels[0].tolist(), table.levels[-1].tolist()
    if last > sigma or (isinstance(sampler, Sampler) and sampler.skipped):
        return
    path = sampler.schedule if isinstance(sampler, Sampler) else None
    if path is not None and _share_at_the_end(path) > MAX_SHARE_AT_THE_END:
        warn_of_image_at_the_end(path)
        return
    share = _share(alpha, sigma)
    if share > MAX_SHARE_AT_THE_BEGINNING:
        _warn(
            f"the {table.num_steps} steps of {table.name} begin at abar = {share:.3g}, so that "
            f"{share:.0%} of the variance of x is the image's there, but sampling starts from pure "
            "noise. Take more steps, or a grid that begins at the last timestep, such as "
            "grid='trailing'"
        )


def _share_at_the_end(path: GaussianPath) -> float:
    """The image's share at the last timestep, 0 on a path that does not scale images."""
    alpha = path.alpha_t[-1].item()
    return 0.0 if alpha == 1 else _share(alpha, path.sigma_t[-1].item())


def _share(alpha: float, sigma: float) -> float:
    return alpha**2 / (alpha**2 + sigma**2)


def _warn(message: str) -> None:
    """Warn with the line of the caller outside the library as the place of the warning."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"fastdiff: {message}", stacklevel=level)


def _is_inside(module: str) -> bool:
    """Whether a module is of fastdiff, or of torch, whose decorators are between the frames."""
    return module.split(".")[0] in ("fastdiff", "torch")
