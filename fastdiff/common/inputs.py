"""Checks of what functions of the whole library are given; each error names the value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last for images whose strides say so, else contiguous.

    With one channel both hold, and the strides decide which of them a network goes on with.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None or x.stride(1) != 1 or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def real_parameter(model: Callable[..., Any]) -> Tensor | None:
    """The first floating point parameter of a model, if it is a module and has one."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next(filter(is_real, parameters), None)


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


def as_arguments(value: Any, name: str) -> dict[str, Any]:
    """The model's keyword arguments; TypeError unless they are a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a mapping of the model's keyword arguments, got {type(value).__name__}"
        )
    return dict(value)


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
    if not is_real(value):
        raise TypeError(f"{name} must be a floating point tensor, got {kind_of(value)}")
    if value.shape not in shapes:
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")


def is_real(value: Any) -> TypeGuard[Tensor]:
    """Whether ``value`` is a floating point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def kind_of(value: Any) -> str:
    """What an error calls ``value``: the dtype of a tensor, the type of anything else."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def whole_number(value: Any, name: str) -> int:
    """``value`` as int; TypeError unless it is a whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
