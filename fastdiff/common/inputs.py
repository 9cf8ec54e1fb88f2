"""Checks of arguments that many functions share; each error names the given value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of images, by their strides: channels_last (4 or 5 dimensions) or not.

    An image with one channel has both formats; the stride of its channels then decides.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None or x.stride(1) != 1 or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def laid_out(x: Tensor, device: torch.device, wanted: torch.memory_format) -> Tensor:
    """A batch on a device, in a memory format; that of images is not wanted of other samples."""
    return x.to(device, memory_format=wanted if x.ndim == 4 else torch.contiguous_format)


def real_parameter(model: Callable[..., Any]) -> Tensor | None:
    """The first floating point parameter of a model; None if it has none or is no module."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next(filter(is_real, parameters), None)


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """TypeError or ValueError unless ``generator`` is None or a generator of the CPU or device."""
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
    """ValueError or TypeError unless ``max_batch`` is None or a whole number of at least 1."""
    if max_batch is not None and whole_number(max_batch, "max_batch") < 1:
        raise ValueError(f"max_batch must be at least 1, or None, got {max_batch}")


def as_arguments(value: Any, name: str) -> dict[str, Any]:
    """The model's keyword arguments as a dict; TypeError unless ``value`` is a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a mapping of the model's keyword arguments, got {type(value).__name__}"
        )
    return dict(value)


def checked_seeds(
    seed: int | Sequence[int] | Tensor, generator: torch.Generator | None, images: int
) -> Tensor:
    """The seed and the image number of each image, int64 [N, 2].

    From one seed all images take that seed and the numbers 0..N-1. From N seeds each image takes
    its own seed and the number 0.

    Args:
        seed: one whole number or N, of at most 64 bits each.
        generator: must be None; an argument so that the error can name both.
        images: N.

    Raises:
        ValueError: another number of seeds, a seed of more than 64 bits, or a generator.
        TypeError: a seed that is no whole number.
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
    # As in PyTorch, a seed of 2^63 or more is the negative number with the same 64 bits.
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
    """The kind of ``value`` for an error: the dtype of a tensor, the type of anything else."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def whole_number(value: Any, name: str) -> int:
    """``value`` as int; TypeError unless it is a whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """ValueError unless ``value`` is one of ``choices``; ``name`` says what is chosen."""
    if value not in choices:
        wanted = ", ".join(map(str, choices))
        raise ValueError(f"unknown {name} {value!r}, wanted one of {wanted}")
