"""Checks of the arguments of ``fastdiff.sample``; errors name the value and what was wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.common.inputs import Shape, is_real, kind_of, real_parameter, whole_number
from fastdiff.samplers import COLUMNS, Sampler, Table
from fastdiff.sampling import capture

MODES = ("auto", "eager", "compile", "cudagraph")


def begin_at(sampler: Sampler | Table, start: int) -> tuple[Table, float]:
    """The table from step ``start`` on, and the standard deviation that x_T must have.

    Raises:
        TypeError: ``sampler`` is neither a sampler nor a table, or ``start`` is no whole number.
        ValueError: ``start`` is not one of the sampler's steps, or a bare table cannot begin there.
    """
    if not isinstance(sampler, (Sampler, Table)):
        raise TypeError(f"sampler must be a Sampler or a Table, got {type(sampler).__name__}")
    start = whole_number(start, "start")
    steps = sampler.num_steps if isinstance(sampler, Table) else sampler.steps
    if not 0 <= start < steps:
        raise ValueError(f"start must be one of the sampler's steps, 0..{steps - 1}, got {start}")
    if isinstance(sampler, Table):
        table = _steps_from(sampler, start) if start else sampler
    else:
        table = sampler.starting_at(start).table if start else sampler.table
    return table, 1.0 if start else table.init_noise_sigma


def _steps_from(table: Table, start: int) -> Table:
    """A table's rows from step ``start`` on; ValueError if they read values of earlier rows."""
    first = table.steps.tolist().index(start)
    if reads_earlier(table.values[first:]):
        raise ValueError(
            f"this table's steps from {start} on need what earlier steps keep: "
            f"give the sampler instead, which can begin at step {start}"
        )
    return replace(
        table,
        values=table.values[first:],
        timesteps=table.timesteps[first:],
        steps=table.steps[first:] - start,
        levels=table.levels[first:],
    )


def reads_earlier(values: Tensor) -> bool:
    """Whether a sequence of rows of a table reads a slot before one of the rows has written it."""
    kept: set[int] = set()
    for row in values.tolist():
        read = {j for j, value in enumerate(row[len(COLUMNS) :]) if value != 0}
        if not read <= kept:
            return True
        kept.add(int(row[COLUMNS.index("slot")]))
    return False


def target(
    model: Callable[..., Any],
    shape: Sequence[int],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    given: tuple[Tensor | None, Tensor | None],
) -> tuple[Shape, torch.device, torch.dtype]:
    """Shape, device and dtype of the images.

    Args:
        model: the model.
        shape: the shape [N, C, ...].
        device: the device; None takes that of x_T, else the model's, else the image's.
        dtype: the dtype; None takes that of x_T, else the model's, else the image's.
        given: x_T and the image, each a tensor or None.

    Raises:
        ValueError: ``shape`` is not [N, C, ...].
        TypeError: the dtype is not floating point.
    """
    shape = tuple(whole_number(size, "every size in shape") for size in shape)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be [N, C, ...], got {shape}")
    x_T, image = given
    example = next(
        filter(is_real, (x_T, real_parameter(model), image)), torch.empty(0, device="cpu")
    )
    device = torch.device(example.device if device is None else device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = example.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"images must be floating point, got {dtype}")
    return shape, device, dtype


def check_mode(mode: str, device: torch.device) -> None:
    """ValueError unless ``mode`` is one of MODES that is possible on the device."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}, wanted one of {', '.join(MODES)}")
    if mode == "cudagraph" and not capture.graphs.can_capture(device):
        raise ValueError(f"mode 'cudagraph' needs images on a CUDA device, got {device}")


def check_resampling(resamplings: int, jump_length: int, mask: Tensor | None) -> None:
    """TypeError or ValueError unless both are whole numbers >= 1, with a mask if resampling."""
    for name, value in (("resamplings", resamplings), ("jump_length", jump_length)):
        if whole_number(value, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if resamplings > 1 and mask is None:
        raise ValueError(f"resamplings are for inpainting, with a mask, got {resamplings}")


def check_beginning(
    start: int, x_T: Tensor | None, image: Tensor | None, mask: Tensor | None
) -> None:
    """ValueError unless the arguments together define what to begin with.

    An image needs a start above 0 or a mask, and both of these need an image (a start may have x_T
    instead).
    """
    if image is None and mask is not None:
        raise ValueError("a mask needs an image: what is known where the mask is 0")
    if image is None and x_T is None and start:
        raise ValueError(f"start = {start} needs an image to noise, or x_T to go on from")
    if image is not None and mask is None and not start:
        raise ValueError("an image needs a start above 0 (image to image) or a mask (inpainting)")


def check_callbacks(callback: Any, preview: Any, every: int) -> None:
    """TypeError or ValueError unless the functions are None or callable, and ``every`` >= 1."""
    for name, value in (("callback", callback), ("preview", preview)):
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a function, or None, got {type(value).__name__}")
    if whole_number(every, "every") < 1:
        raise ValueError(f"every must be at least 1, got {every}")


def check_mask(mask: Tensor, shape: Shape) -> None:
    """TypeError or ValueError unless ``mask`` fits the images and has values in [0, 1]."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(f"mask must be a bool or floating point tensor, got {kind_of(mask)}")
    images, channels, *rest = shape
    fits = mask.ndim == len(shape) and mask.shape[0] in (1, images)
    if not fits or mask.shape[1] not in (1, channels) or list(mask.shape[2:]) != rest:
        raise ValueError(
            f"mask must have shape [{images} or 1, {channels} or 1, {', '.join(map(str, rest))}], "
            f"got {tuple(mask.shape)}"
        )
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("mask must lie in [0, 1]: 1 where to generate, 0 where to keep the image")
