"""What is measured of an image, and how a model restores the rest, for ``fastdiff restore``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastdiff.common.conditions import Conditions
from fastdiff.common.errors import InputError
from fastdiff.data import image_file
from fastdiff.data.image_file import Reading
from fastdiff.data.image_grid import from_uint8
from fastdiff.diffusion import Diffusion
from fastdiff.generation import Samples
from fastdiff.guidance import (
    Measured,
    grey,
    pixels,
    posterior_sampling,
    pseudoinverse_guided,
    smaller,
)
from fastdiff.samplers import Sampler
from fastdiff.sampling import sample
from fastdiff.sde import Solver, known_grey, known_pixels
from fastdiff.sde.solvers.known_part import Known

# For each method its sampler, steps and options of the sampler if none are given.
METHODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dps": ("ddpm", 100, {"clip": None}),
    "pseudoinverse": ("ddim", 50, {}),
    "repaint": ("ddpm", 50, {}),
    "known": ("reverse-diffusion", 200, {}),
}
DATA_STD = 0.5  # of pseudoinverse guidance, for images in [-1, 1]


@dataclass(frozen=True)
class Problem:
    """Images, and what a task leaves of them.

    Attributes:
        images: as they were given, [M, C, S, S] in [-1, 1].
        measured: the operator A that says what is left.
        y: what is left, the operator's result for each image.
        shown: what is left, as images [M, C, S, S].
        mask: [1, 1, S, S], 1 where to inpaint; None for other tasks.
        known: what is left as a solver of an SDE keeps it, of images [N, C, S, S]; None if it is
            no projection.
    """

    images: Tensor
    measured: Measured
    y: Tensor
    shown: Tensor
    mask: Tensor | None = None
    known: Callable[[Tensor], Known] | None = None


def inpainting(files: Sequence[Path], size: int, channels: int, mask: str | None) -> Problem:
    """The pixels where a mask is black; InputError for a mask that does not fit."""
    if mask is None:
        raise InputError("inpaint needs --mask: an image, white where to paint, or a box")
    images = _read(files, Reading(size, grayscale=channels == 1))
    hidden = _mask(mask, files, size)
    measured = pixels(hidden)
    y = measured.apply(images)
    return Problem(images, measured, y, y, hidden, lambda x: known_pixels(x, hidden))


def colorization(files: Sequence[Path], size: int, channels: int) -> Problem:
    """The mean of the colours; InputError for a model without colours."""
    if channels != 3:
        raise InputError(f"colorize needs a model of 3 channels, this one has {channels}")
    images, measured = _read(files, Reading(size)), grey()
    y = measured.apply(images)
    return Problem(images, measured, y, y.expand_as(images), known=known_grey)


def enlargement(files: Sequence[Path], size: int, channels: int, factor: int) -> Problem:
    """Means of squares of pixels; InputError unless the squares fill an image."""
    if factor < 2 or size % factor:
        raise InputError(f"--factor must be 2 or more and divide {size}, got {factor}")
    grayscale = channels == 1
    images = _read(files, Reading(size, grayscale=grayscale))
    # The box filter takes the mean of the squares, and leaves files that are small already.
    y = _read(files, Reading(size // factor, grayscale=grayscale, resize="box"))
    return Problem(images, smaller(factor), y, F.interpolate(y, scale_factor=float(factor)))


def restore(
    diffusion: Diffusion,
    problem: Problem,
    method: str,
    sampler: Sampler | Solver,
    cond: Mapping[str, Any],
    *,
    each: int,
    options: Mapping[str, Any],
    generator: torch.Generator,
    device: torch.device,
    progress: bool | str,
) -> Samples:
    """``each`` images for each of the problem's M: [M * each, C, S, S], and their evaluations.

    Args:
        diffusion: the model and its process.
        problem: what is known.
        method: one of ``METHODS``.
        sampler: of the model; a solver with fixed steps for the method "known".
        cond: the model's arguments, with a row for each of the M * each images.
        each: number of images.
        options: of the method.
        generator: source of all noise, on the CPU.
        device: where the model is.
        progress: show a progress bar; a string is its title.

    Raises:
        InputError: a method that does not do this task, or that does not take the sampler.
        TypeError, ValueError: options that the method refuses.
    """

    def repeated(value: Tensor) -> Tensor:
        return value.repeat_interleave(each, 0).to(device)

    images, network = repeated(problem.images), diffusion.network
    x_T = torch.randn(images.shape, generator=generator, device="cpu").to(device)
    if method == "known":
        if problem.known is None or not isinstance(sampler, Solver):
            raise InputError("--method known is for inpaint and colorize, by a solver of an SDE")
        solved = sampler.sample(
            network.score(Conditions(cond, None, len(images), cut=True)),
            x_T * sampler.sde.prior_std, known=problem.known(images), conditioned=True,
            generator=generator, progress=progress, **options,
        )  # fmt: skip
        return Samples(solved.x, solved.evaluations)
    if not isinstance(sampler, Sampler):
        raise InputError(f"--method {method} needs a sampler with timesteps, not {sampler.method}")
    run: dict[str, Any] = {"x_T": x_T, "cond": cond, "generator": generator, "progress": progress}
    if method == "repaint":
        if problem.mask is None:
            raise InputError("--method repaint is for inpaint")
        return diffusion.generate(
            sampler, images.shape, image=images, mask=problem.mask.to(device), **run, **options
        )
    model, y = network.for_sampler(sampler), repeated(problem.y)
    if method == "dps":
        guided = posterior_sampling(model, problem.measured, y, sampler, **options)
    else:
        guided = pseudoinverse_guided(
            model, problem.measured, y, sampler.schedule, kind=sampler.prediction,
            **{"data_std": DATA_STD, **options},
        )  # fmt: skip
    restored: Any = sample(guided, sampler, images.shape, device=device, **run)
    evaluations = torch.full((len(images),), sampler.table.rows, dtype=torch.int64, device="cpu")
    return Samples(restored, evaluations)


def _read(files: Sequence[Path], reading: Reading) -> Tensor:
    """The images in [-1, 1], [M, C, S, S]."""
    for path in files:
        if not path.is_file():
            raise InputError(f"there is no image {path}")
    found = [image_file.read(path, reading, str(path))[0] for path in files]
    return from_uint8(torch.stack([torch.tensor(pixels) for pixels in found])).permute(0, 3, 1, 2)


def _mask(given: str, files: Sequence[Path], size: int) -> Tensor:
    """1 where to paint, [1, 1, size, size], of a file or of a box "left,top,right,bottom"."""
    path, numbers = Path(given), given.split(",")
    if path.is_file():
        _check_sizes(path, files, size)
        image = _read([path], Reading(size, grayscale=True, resize="box"))
        mask = (image > 0).float()
    elif len(numbers) == 4 and all(number.strip().isdecimal() for number in numbers):
        left, top, right, bottom = map(int, numbers)
        if not (left < right <= size and top < bottom <= size):
            raise InputError(
                f"--mask left,top,right,bottom must lie in 0..{size} and hold a pixel, got {given}"
            )
        mask = torch.zeros(1, 1, size, size, device="cpu")
        mask[..., top:bottom, left:right] = 1
    else:
        raise InputError(f"--mask takes an image file or left,top,right,bottom, got {given!r}")
    if not bool(mask.any()) or bool(mask.all()):
        what = "nothing to paint" if not bool(mask.any()) else "nothing that is known"
        raise InputError(f"--mask {given} leaves {what}: white is painted, black is kept")
    return mask


def _check_sizes(mask: Path, files: Sequence[Path], size: int) -> None:
    """InputError unless a mask has the model's size or that of every image."""
    width, height = _size(mask)
    if (width, height) == (size, size):
        return
    for path in files:
        other = _size(path)
        if other != (width, height):
            raise InputError(
                f"--mask {mask} is {width}x{height} pixels, but {path} is {other[0]}x{other[1]}: "
                f"it must be as large as the image, or {size}x{size} as the model's images"
            )


def _size(path: Path) -> tuple[int, int]:
    """Width and height of an image file."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise InputError(f"cannot read {path} as an image: {error}") from None
