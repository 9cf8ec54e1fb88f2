"""Checks of what ``fastdiff.sample`` is given; each error names the value and what was wanted."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastdiff.samplers import COLUMNS, Sampler, Table
from fastdiff.sampling import capture

MODES = ("auto", "eager", "compile", "cudagraph")
Shape = tuple[int, ...]


def begin_at(sampler: Sampler | Table, start: int) -> tuple[Table, float]:
    """The table from step ``start`` on, and the standard deviation that x_T is to have.

    Raises:
        TypeError: ``sampler`` is neither a sampler nor a table, or ``start`` no whole number.
        ValueError: ``start`` is not one of its steps, or a bare table cannot begin there.
    """
    if not isinstance(sampler, (Sampler, Table)):
        raise TypeError(f"sampler must be a Sampler or a Table, got {type(sampler).__name__}")
    start = whole_number(start, "start")
    steps = sampler.num_steps if isinstance(sampler, Table) else sampler.steps
    if not 0 <= start < steps:
        raise ValueError(f"start must be one of the sampler's steps, 0..{steps - 1}, got {start}")
    if isinstance(sampler, Table):
        table = _later(sampler, start) if start else sampler
    else:
        table = sampler.starting_at(start).table if start else sampler.table
    return table, 1.0 if start else table.init_noise_sigma


def _later(table: Table, start: int) -> Table:
    """A table's rows from a step on; ValueError if they need what earlier ones keep."""
    first = table.steps.tolist().index(start)
    if reads_earlier(table.values[first:]):
        raise ValueError(
            f"this table's steps from {start} on need what earlier steps keep: "
            "give the sampler instead, which can begin there"
        )
    return replace(
        table,
        values=table.values[first:],
        timesteps=table.timesteps[first:],
        steps=table.steps[first:] - start,
        levels=table.levels[first:],
    )


def reads_earlier(values: Tensor) -> bool:
    """Whether rows of a table, one after the other, read what none of them has kept."""
    kept: set[int] = set()
    for row in values.tolist():
        read = {j for j, value in enumerate(row[len(COLUMNS) :]) if value != 0}
        if not read <= kept:
            return True
        kept.add(int(row[COLUMNS.index("slot")]))
    return False


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last for images whose strides say so, else contiguous.

    With one channel both hold, and the strides decide which of them a network goes on with.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None or x.stride(1) != 1 or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def target(
    model: Callable[..., Any],
    shape: Sequence[int],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    given: tuple[Tensor | None, Tensor | None],
) -> tuple[Shape, torch.device, torch.dtype]:
    """Shape, device and dtype of the images; what is None is x_T's, the model's, or the image's.

    Raises:
        ValueError: ``shape`` is not [N, C, ...].
        TypeError: the dtype is not floating point.
    """
    shape = tuple(whole_number(size, "every size in shape") for size in shape)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be [N, C, ...], got {shape}")
    x_T, image = given
    example = next(
        filter(_is_real, (x_T, real_parameter(model), image)), torch.empty(0, device="cpu")
    )
    device = torch.device(example.device if device is None else device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = example.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"images must be floating point, got {dtype}")
    return shape, device, dtype


def real_parameter(model: Callable[..., Any]) -> Tensor | None:
    """The first floating point parameter of a model, if it is a module and has one."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next(filter(_is_real, parameters), None)


def check_mode(mode: str, device: torch.device) -> None:
    """ValueError unless ``mode`` is one of MODES that is possible on the device."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}, wanted one of {', '.join(MODES)}")
    if mode == "cudagraph" and not capture.graphs.can_capture(device):
        raise ValueError(f"mode 'cudagraph' needs images on a CUDA device, got {device}")


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """TypeError or ValueError unless a generator is one, the CPU's or the device's own."""
    if generator is None:
        return
    if not hasattr(generator, "device"):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != "cpu" and generator.device != device:
        raise ValueError(
            f"for images on {device} the generator must be on {device} or on the CPU, "
            f"got one on {generator.device}"
        )


def check_max_batch(max_batch: int | None) -> None:
    """ValueError or TypeError unless ``max_batch`` is None or a whole number from 1 on."""
    if max_batch is not None and whole_number(max_batch, "max_batch") < 1:
        raise ValueError(f"max_batch must be at least 1, or None, got {max_batch}")


def check_resampling(resamplings: int, jump_length: int, mask: Tensor | None) -> None:
    """TypeError or ValueError unless both are whole numbers from 1 on, and there is a mask."""
    for name, value in (("resamplings", resamplings), ("jump_length", jump_length)):
        if whole_number(value, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if resamplings > 1 and mask is None:
        raise ValueError(f"resamplings are for inpainting, with a mask, got {resamplings}")


def check_beginning(
    start: int, x_T: Tensor | None, image: Tensor | None, mask: Tensor | None
) -> None:
    """ValueError unless these say together what to begin with, and what to do with an image."""
    if image is None and mask is not None:
        raise ValueError("a mask needs an image: what is known where the mask is 0")
    if image is None and x_T is None and start:
        raise ValueError(f"start = {start} needs an image to noise, or x_T to go on from")
    if image is not None and mask is None and not start:
        raise ValueError("an image needs a start above 0 (image to image) or a mask (inpainting)")


def as_arguments(value: Any, name: str) -> dict[str, Any]:
    """The model's keyword arguments; TypeError unless they are a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a mapping of the model's keyword arguments, got {type(value).__name__}"
        )
    return dict(value)


def check_callbacks(callback: Any, preview: Any, every: int) -> None:
    """TypeError or ValueError unless both are None or callable, and ``every`` is at least 1."""
    for name, value in (("callback", callback), ("preview", preview)):
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a function, or None, got {type(value).__name__}")
    if whole_number(every, "every") < 1:
        raise ValueError(f"every must be at least 1, got {every}")


def checked_seeds(
    seed: int | Sequence[int] | Tensor, generator: torch.Generator | None, images: int
) -> Tensor:
    """For each image its seed and its number, int64 [N, 2].

    One seed numbers the images; of N seeds each has image number 0.

    Raises:
        ValueError: another number of seeds, a seed of more than 64 bits, or a generator beside it.
        TypeError: no whole numbers.
    """
    if generator is not None:
        raise ValueError("seed and generator cannot both be given: each is the source of all noise")
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != images:
            raise ValueError(
                f"seed must be one whole number, or {images}, one an image, got {len(seed)}"
            )
        rows = [(whole_number(value, "seed"), 0) for value in seed]
    else:
        rows = [(whole_number(seed, "seed"), image) for image in range(images)]
    for value, _ in rows:
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"seed must lie in -2^63..2^64-1, got {value}")
    # As PyTorch does: seeds above 2^63 are those of the same 64 bits below 0.
    signed = [((value + 2**63) % 2**64 - 2**63, image) for value, image in rows]
    return torch.tensor(signed, dtype=torch.int64, device="cpu").view(images, 2)


def check_images(value: Tensor, name: str, shapes: Sequence[Shape]) -> None:
    """TypeError or ValueError unless ``value`` is floating point and of one of ``shapes``."""
    if not _is_real(value):
        raise TypeError(f"{name} must be a floating point tensor, got {_kind(value)}")
    if value.shape not in shapes:
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")


def check_mask(mask: Tensor, shape: Shape) -> None:
    """TypeError or ValueError unless ``mask`` says in [0, 1] for every pixel what to do."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(f"mask must be a bool or floating point tensor, got {_kind(mask)}")
    images, channels, *rest = shape
    fits = mask.ndim == len(shape) and mask.shape[0] in (1, images)
    if not fits or mask.shape[1] not in (1, channels) or list(mask.shape[2:]) != rest:
        raise ValueError(
            f"mask must have shape [{images} or 1, {channels} or 1, {', '.join(map(str, rest))}], "
            f"got {tuple(mask.shape)}"
        )
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("mask must lie in [0, 1]: 1 where to generate, 0 where to keep the image")


def _is_real(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def whole_number(value: Any, name: str) -> int:
    """``value`` as int; TypeError unless it is a whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
