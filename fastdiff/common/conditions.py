"""The model's keyword arguments for a batch: which of their tensors have one row for each image.

A batch may be sampled in parts, finished images may leave it, and classifier-free guidance gives it
to the model twice in one call, first without the condition and then with it (Ho & Salimans 2022,
arXiv:2207.12598). Then tensors with one row per image are cut and joined like the images, and
everything else stays whole. A tensor with as many rows as there are images might be of either kind.
Its kind is never guessed where it matters:

- ``PerImage(value)`` and ``Shared(value)`` state it, for a tensor or for all tensors in nested
  lists, tuples and dicts;
- the arguments named in ``PER_IMAGE_NAMES`` have one row per image in every library that has them;
- values that differ with and without the condition must have one row per image;
- other tensors with as many rows as images are an error if the images are computed in parts or
  given to the model twice; otherwise they stay whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Arguments = dict[str, Any]

PER_IMAGE_NAMES = ("class_labels", "encoder_attention_mask", "encoder_hidden_states", "labels", "y")


@dataclass(frozen=True, eq=False)
class PerImage:
    """An argument of the model whose tensors have one row for each image of the batch.

    Attributes:
        value: a tensor [N, ...], or nested lists, tuples and dicts of such tensors.

    Example:
        >>> cond = {"sizes": fastdiff.PerImage(sizes), "codes": fastdiff.Shared(codes)}
        >>> images = fastdiff.sample(model, sampler, (4, 3, 32, 32), cond=cond, max_batch=2)
    """

    value: Any


@dataclass(frozen=True, eq=False)
class Shared:
    """An argument of the model that all images share, whatever the sizes of its tensors.

    Attributes:
        value: anything; tensors in it are neither cut nor repeated.
    """

    value: Any


Mark = type[PerImage] | type[Shared]


class _Leaf(NamedTuple):
    """One value of the arguments, without the condition and with it (equal if not joined)."""

    without: Any
    value: Any
    per_image: bool


class Conditions:
    """A model's arguments for N images, each tensor known to be per image or shared.

    Args:
        cond: keyword arguments of the model: tensors, or nested lists, tuples and dicts of tensors,
            marked by :class:`PerImage` and :class:`Shared` where necessary.
        uncond: the same keywords without the condition, or None.
        images: N.
        joined: whether the model is given all images twice in one call, first with ``uncond``.
        cut: whether the images may be computed in parts.

    Raises:
        ValueError: ``uncond`` has other keys, or values that do not fit those of ``cond``; a value
            has two marks; a value marked per image does not have N rows; or a tensor of N rows is
            not marked although its kind matters.
    """

    def __init__(
        self,
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any] | None,
        images: int,
        *,
        joined: bool = False,
        cut: bool = False,
    ) -> None:
        if uncond is not None and set(uncond) != set(cond):
            raise ValueError(
                f"uncond must have the keys of cond, {sorted(cond)}, got {sorted(uncond)}"
            )
        self.images, self.joined, self.cut = images, joined, cut
        self._arguments: dict[str, tuple[list[_Leaf], pytree.TreeSpec]] = {}
        for name, value in cond.items():
            other = value if uncond is None else uncond[name]
            self._arguments[name] = self._settled(name, other, value)

    def part(self, part: slice | Tensor) -> Arguments:
        """The model's arguments for a part of the images.

        Args:
            part: a slice, or the places of M images, int64 [M].

        Returns:
            Arguments for M images; if joined, for 2 M images, the rows of ``uncond`` first.
        """
        return {
            name: pytree.tree_unflatten([self._of(leaf, part) for leaf in leaves], structure)
            for name, (leaves, structure) in self._arguments.items()
        }

    def _of(self, leaf: _Leaf, part: slice | Tensor) -> Any:
        if not leaf.per_image:
            return leaf.value
        if self.joined:
            return torch.cat([leaf.without[part], leaf.value[part]])
        return leaf.value[part]

    def _settled(self, name: str, other: Any, value: Any) -> tuple[list[_Leaf], pytree.TreeSpec]:
        value, marks = _unwrapped(value)
        other, other_marks = _unwrapped(other)
        leaves, structure = pytree.tree_flatten(value)
        others, other_structure = pytree.tree_flatten(other)
        if structure != other_structure:
            raise ValueError(f"uncond[{name!r}] must be built like cond[{name!r}]")
        settled = []
        for u, c, one, two in zip(others, leaves, other_marks, marks, strict=True):
            if one and two and one is not two:
                raise ValueError(f"uncond[{name!r}] and cond[{name!r}] must be marked alike")
            settled.append(_Leaf(u, c, self._is_per_image(name, u, c, two or one)))
        return settled, structure

    def _is_per_image(self, name: str, u: Any, c: Any, mark: Mark | None) -> bool:
        """Whether a value has one row per image; ValueError if that matters and is not known."""
        rows = self._has_rows(c) and mark is not Shared
        if mark is PerImage and isinstance(c, Tensor) and not rows:
            raise ValueError(
                f"cond[{name!r}] is marked PerImage, so its tensors must have {self.images} rows, "
                f"one an image, got {_described(c)}"
            )
        alike = u is c or _are_equal(u, c)
        if not alike and not (rows and self._has_rows(u) and u.shape == c.shape):
            raise ValueError(
                f"uncond[{name!r}] must be equal to cond[{name!r}], or both must be tensors of "
                f"one shape with {self.images} rows, got {_described(u)} and {_described(c)}"
            )
        if not rows or mark is PerImage or name in PER_IMAGE_NAMES or not alike:
            return rows
        if self.joined or (self.cut and self.images > 1):
            given = "all images twice" if self.joined else "a part of the images at a time"
            raise ValueError(
                f"cond[{name!r}] has a tensor of {self.images} rows, as many as there are images, "
                f"and the model is given {given}: pass fastdiff.PerImage(value) if each image has "
                "its own row, fastdiff.Shared(value) if all images share the whole tensor"
            )
        return False

    def _has_rows(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape[:1] == (self.images,)


def unmarked(cond: Mapping[str, Any]) -> Arguments:
    """The arguments without their marks, for a call of the model with all images."""
    return {name: _unwrapped(value)[0] for name, value in cond.items()}


def _unwrapped(value: Any, mark: Mark | None = None) -> tuple[Any, list[Mark | None]]:
    """A value without its marks, and the innermost mark around each of its leaves."""
    leaves, structure = pytree.tree_flatten(value)
    plain: list[Any] = []
    marks: list[Mark | None] = []
    for leaf in leaves:
        if isinstance(leaf, (PerImage, Shared)):
            inside, inner = _unwrapped(leaf.value, type(leaf))
            plain.append(inside)
            marks += inner
        else:
            plain.append(leaf)
            marks.append(mark)
    return pytree.tree_unflatten(plain, structure), marks


def _are_equal(u: Any, c: Any) -> bool:
    if isinstance(u, Tensor) and isinstance(c, Tensor):
        return u.shape == c.shape and torch.equal(u, c)
    return type(u) is type(c) and bool(u == c)


def _described(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
