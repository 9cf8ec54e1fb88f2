"""Weights as the convolutions read them, packed once and never stale.

What is packed belongs to the parameters, not to a graph: graphs for other sizes share it, and it
goes when they go. ``fastdiff.ops.weights_state`` tells whether they have changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops.conv2d import conv2d_pack
from fastdiff.ops.weights_state import weights_state

# Makes a weight [K, C, ...], and a bias [K] where it has one, of the parts.
Combine = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor | None]]
_lock = threading.RLock()
_packed: dict[tuple[Any, ...], PackedWeight] = {}


def behind(parts: Sequence[Tensor]) -> tuple[Tensor, None]:
    """One behind the other along the output channels."""
    found = [part.detach() for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found), None


class PackedWeight:
    """A weight, or several as one, at one moment.

    Args:
        parts: what it is made of.
        kernel: height and width.
        combine: makes it of them; equal to another that makes the same.

    Attributes:
        weight: [K, C, R, S]; of one part alone it shares the memory.
        bias: [K] where ``combine`` makes one.
    """

    def __init__(
        self, parts: Sequence[Tensor], kernel: tuple[int, int], combine: Combine = behind
    ) -> None:
        self.key = (combine, *map(id, parts))
        self.references = [weakref.ref(part, self._forget) for part in parts]
        # Before anything is packed: what is written meanwhile is then seen the next time.
        self.state = weights_state(parts)
        flat, self.bias = combine(parts)
        self.weight = flat.view(*flat.shape[:2], *kernel)
        self.by_algorithm: dict[str, Tensor] = {}

    def _forget(self, _: object) -> None:
        with _lock:
            if _packed.get(self.key) is self:
                del _packed[self.key]

    def is_current(self, parts: Sequence[Tensor]) -> bool:
        """Whether ``parts`` hold what they held."""
        alive = all(ref() is part for ref, part in zip(self.references, parts, strict=True))
        return alive and weights_state(parts) == self.state

    def packed(self, algorithm: str) -> Tensor:
        """What ``conv2d_pack`` gives for an algorithm."""
        found = self.by_algorithm.get(algorithm)
        if found is None:
            with _lock:
                found = self.by_algorithm.get(algorithm)
                if found is None:
                    found = self.by_algorithm[algorithm] = conv2d_pack(self.weight, algorithm)
        return found

    def memory(self) -> dict[str, int]:
        """Bytes besides those of the parameters, by algorithm, and of a copy of them."""
        copied = self.weight.nbytes if len(self.references) > 1 else 0
        packed = list(self.by_algorithm.items())
        return {"copy": copied, **{name: weight.nbytes for name, weight in packed}}


def current(
    parts: Sequence[Tensor], kernel: tuple[int, int], combine: Combine = behind
) -> PackedWeight:
    """The packed form of what ``parts`` hold now."""
    key = (combine, *map(id, parts))
    found = _packed.get(key)
    if found is None or not found.is_current(parts):
        with _lock:
            found = _packed.get(key)
            if found is None or not found.is_current(parts):
                found = _packed[key] = PackedWeight(parts, kernel, combine)
    return found


class Watch:
    """Called first in a graph, with all weights that it packs: their packed forms.

    Args:
        counts: how many weights make up each packed one.
        kernels: height and width of each.
        combines: what makes each of its parts; by default they are put one behind the other.
    """

    __name__ = "weights"
    __qualname__ = "weights"

    def __init__(
        self,
        counts: Sequence[int],
        kernels: Sequence[tuple[int, int]],
        combines: Sequence[Combine] | None = None,
    ) -> None:
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        self.slices = [slice(e - c, e) for e, c in zip(ends, counts, strict=True)]
        self.kernels = list(kernels)
        self.combines = list(combines or [behind] * len(self.kernels))
        self.last: tuple[int, list[weakref.ref[PackedWeight]]] | None = None

    def __call__(self, *weights: Tensor) -> list[PackedWeight | None]:
        """One for each of ``counts``."""
        # Before they are looked at, for the reason that PackedWeight gives.
        state, last = weights_state(weights), self.last
        if last is not None and last[0] == state:
            found = [reference() for reference in last[1]]
            if None not in found:
                return found
        packed = [
            current(weights[part], kernel, combine)
            for part, kernel, combine in zip(self.slices, self.kernels, self.combines, strict=True)
        ]
        self.last = state, [weakref.ref(weight) for weight in packed]
        return [*packed]
