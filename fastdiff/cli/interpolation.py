"""Noise between that of two images, or of two seeds, for ``fastdiff sample --interpolate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import InputError
from fastdiff.data import image_file
from fastdiff.data.image_grid import from_uint8
from fastdiff.generation import draws_noise, slerp
from fastdiff.samplers import Sampler
from fastdiff.sde import Solver


def check_sampler(sampler: Sampler | Solver) -> None:
    """InputError if the sampler adds noise, which would hide the noise that it begins with."""
    if draws_noise(sampler):
        name = sampler.method if isinstance(sampler, Solver) else sampler.name
        raise InputError(
            f"--interpolate needs a sampler without noise, such as --sampler ddim or ode: {name} "
            "adds some"
        )


def noise_between(
    ends: Sequence[str], model: Checkpoint, rows: Sequence[int | None], columns: int
) -> Tensor:
    """For each row noise from that of the first end to that of the second.

    Args:
        ends: two names of image files or two seeds, whole numbers.
        model: images are encoded by its probability-flow ODE.
        rows: the class of each row, or None for a model without classes.
        columns: number of images in a row, the ends among them.

    Returns:
        [rows * columns, C, S, S] on the CPU.

    Raises:
        InputError: fewer than 2 columns; an end that is neither a number nor a file; a file that
            cannot be read.
    """
    if columns < 2:
        raise InputError(f"--interpolate takes two images or more in a row, got {columns}")
    shares = torch.linspace(0, 1, columns, dtype=torch.float64, device="cpu")
    first, second = (_noise_of(end, model, rows) for end in ends)
    return torch.cat([slerp(a, b, shares) for a, b in zip(first, second, strict=True)])


def _noise_of(end: str, model: Checkpoint, rows: Sequence[int | None]) -> Tensor:
    """The noise of one end in each row, [rows, C, S, S]."""
    shape = (model.channels, model.image_size, model.image_size)
    path = Path(end)
    if path.is_file():
        reading = image_file.Reading(model.image_size, grayscale=model.channels == 1)
        pixels, _ = image_file.read(path, reading, end)
        image = from_uint8(torch.tensor(pixels)).permute(2, 0, 1).expand(len(rows), *shape)
        labels = [row for row in rows if row is not None]
        return model.encode(image.contiguous(), labels if model.classes else None)
    if not end.isdecimal() or int(end) >= 2**63:
        raise InputError(f"--interpolate takes image files or seeds, got {end!r}")
    generator = torch.Generator("cpu").manual_seed(int(end))
    return torch.randn(shape, generator=generator, device="cpu").expand(len(rows), *shape)
