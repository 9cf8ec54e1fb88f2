"""Classifier-free guidance: its strength in each row, and the model's arguments for both halves.

The model sees 2 N images, the first N without the condition and the others with it (Ho & Salimans
2022, arXiv:2207.12598); ``ops.sampler_step`` combines what it returns. An argument is a tensor, or
any nesting of lists, tuples and dicts of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Arguments = dict[str, Any]


def per_step(guidance: float | Sequence[float] | Tensor, steps: int) -> list[float]:
    """The guidance of each of a sampler's steps.

    Raises:
        ValueError: another number of values than one or ``steps``, or values that are not finite.
        TypeError: something else than numbers.
    """
    given: Any = guidance.tolist() if isinstance(guidance, Tensor) else guidance
    single = isinstance(given, (int, float))
    try:
        values = [float(value) for value in ([given] if single else given)]
    except (TypeError, ValueError):
        raise TypeError(f"guidance must be a number, or one a step, got {guidance!r}") from None
    if not single and len(values) != steps:
        raise ValueError(
            f"guidance must be one number, or {steps}, one for each step of the sampler, "
            f"got {len(values)}"
        )
    if not all(map(math.isfinite, values)):
        raise ValueError(f"guidance must be finite, got {guidance}")
    return values * steps if single else values


def check_halves(uncond: Mapping[str, Any], cond: Mapping[str, Any], images: int) -> None:
    """ValueError unless the two have the same keys, and values that :func:`part_of` can join."""
    if set(uncond) != set(cond):
        raise ValueError(f"uncond must have the keys of cond, {sorted(cond)}, got {sorted(uncond)}")
    for name in cond:
        first, structure = pytree.tree_flatten(uncond[name])
        second, other = pytree.tree_flatten(cond[name])
        if structure != other:
            raise ValueError(f"uncond[{name!r}] must be built like cond[{name!r}]")
        for u, c in zip(first, second, strict=True):
            if not _fit(u, c, images):
                raise ValueError(
                    f"uncond[{name!r}] must be equal to cond[{name!r}], or both must be tensors of "
                    f"one shape with {images} rows, got {_described(u)} and {_described(c)}"
                )


def part_of(
    cond: Mapping[str, Any], uncond: Mapping[str, Any] | None, images: int, part: slice | Tensor
) -> Arguments:
    """The arguments for a part of the images, a slice or their places: tensors of N rows are cut,
    others stay whole.

    With ``uncond`` they are for twice as many: its rows stand before those of ``cond``.
    """

    def cut(value: Any) -> Any:
        return value[part] if _has_rows(value, images) else value

    def join(without: Any, value: Any) -> Any:
        return torch.cat([without[part], value[part]]) if _has_rows(value, images) else value

    if uncond is None:
        return {name: pytree.tree_map(cut, value) for name, value in cond.items()}
    return {name: pytree.tree_map(join, uncond[name], value) for name, value in cond.items()}


def _fit(uncond: Any, cond: Any, images: int) -> bool:
    if isinstance(uncond, Tensor) and isinstance(cond, Tensor):
        same_shape = uncond.shape == cond.shape
        return same_shape and (_has_rows(cond, images) or torch.equal(uncond, cond))
    return uncond is cond or (type(uncond) is type(cond) and uncond == cond)


def _has_rows(value: Any, images: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (images,)


def _described(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
