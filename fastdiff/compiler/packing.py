"""Weights as the convolutions read them, packed once and never stale.

What is packed belongs to the parameters, not to a graph: graphs for other sizes share it, and it
goes when they go. ``fastdiff.ops.weights_state`` tells whether they have changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.ops.conv2d import conv2d_pack
from fastdiff.ops.weights_state import weights_state

_lock = threading.RLock()
_packed: dict[tuple[int, ...], PackedWeight] = {}


class PackedWeight:
    """A weight, or several one behind the other along the output channels, at one moment.

    Attributes:
        weight: [K, C, R, S] of all parts; for one part it shares its memory.
    """

    def __init__(self, parts: Sequence[Tensor], kernel: tuple[int, int]) -> None:
        self.key = tuple(map(id, parts))
        self.references = [weakref.ref(part, self._forget) for part in parts]
        # Before anything is packed: what is written meanwhile is then seen the next time.
        self.state = weights_state(parts)
        flat = parts[0].detach() if len(parts) == 1 else torch.cat([p.detach() for p in parts])
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

    @property
    def nbytes(self) -> int:
        """Memory besides that of the parameters."""
        copied = self.weight.nbytes if len(self.key) > 1 else 0
        return copied + sum(packed.nbytes for packed in list(self.by_algorithm.values()))


def current(parts: Sequence[Tensor], kernel: tuple[int, int]) -> PackedWeight:
    """The packed form of what ``parts`` hold now."""
    key = tuple(map(id, parts))
    found = _packed.get(key)
    if found is None or not found.is_current(parts):
        with _lock:
            found = _packed.get(key)
            if found is None or not found.is_current(parts):
                found = _packed[key] = PackedWeight(parts, kernel)
    return found


class Watch:
    """Called first in a graph, with all weights that it packs: their packed forms.

    Args:
        counts: how many weights make up each packed one.
        kernels: height and width of each.
    """

    __name__ = "weights"
    __qualname__ = "weights"

    def __init__(self, counts: Sequence[int], kernels: Sequence[tuple[int, int]]) -> None:
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        self.slices = [slice(e - c, e) for e, c in zip(ends, counts, strict=True)]
        self.kernels = list(kernels)
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
            current(weights[part], kernel)
            for part, kernel in zip(self.slices, self.kernels, strict=True)
        ]
        self.last = state, [weakref.ref(weight) for weight in packed]
        return [*packed]
