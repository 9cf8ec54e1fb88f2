"""Packed weights of the convolutions: packed once, and again when the parameters have changed.

A packed weight belongs to its parameters, not to a graph: graphs for other input sizes share it,
and it is freed when the parameters are freed. ``fastdiff.ops.weights_state`` tells whether
parameters have changed.
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

# Computes a weight [K, C, ...], and a bias [K] or None, from the parts.
Combine = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor | None]]
_lock = threading.RLock()
_packed: dict[tuple[Any, ...], PackedWeight] = {}


def concatenate(parts: Sequence[Tensor]) -> tuple[Tensor, None]:
    """The parts, concatenated along the output channels, and no bias."""
    weights = [part.detach() for part in parts]
    return weights[0] if len(weights) == 1 else torch.cat(weights), None


class PackedWeight:
    """A weight made of one or several parameters, as they are when it is made.

    Args:
        parts: the parameters.
        kernel: height and width of the weight.
        combine: computes the weight from the parts; instances that compute the same are equal.

    Attributes:
        weight: [K, C, R, S]; made of a single part, it shares that part's memory.
        bias: [K], or None where ``combine`` gives none.
    """

    def __init__(
        self, parts: Sequence[Tensor], kernel: tuple[int, int], combine: Combine = concatenate
    ) -> None:
        self.key = (combine, *map(id, parts))
        self.references = [weakref.ref(part, self._forget) for part in parts]
        # Read before packing: a write during packing then makes the state differ at the next call.
        self.state = weights_state(parts)
        flat, self.bias = combine(parts)
        self.weight = flat.view(*flat.shape[:2], *kernel)
        self.by_algorithm: dict[str, Tensor] = {}

    def _forget(self, _: object) -> None:
        with _lock:
            if _packed.get(self.key) is self:
                del _packed[self.key]

    def is_current(self, parts: Sequence[Tensor]) -> bool:
        """Whether ``parts`` are the same tensors with the same contents."""
        alive = all(ref() is part for ref, part in zip(self.references, parts, strict=True))
        return alive and weights_state(parts) == self.state

    def packed(self, algorithm: str) -> Tensor:
        """The weight packed for an algorithm, by ``conv2d_pack`` at the first call."""
        packed = self.by_algorithm.get(algorithm)
        if packed is None:
            with _lock:
                packed = self.by_algorithm.get(algorithm)
                if packed is None:
                    packed = self.by_algorithm[algorithm] = conv2d_pack(self.weight, algorithm)
        return packed

    def memory(self) -> dict[str, int]:
        """Bytes of each packed form, by algorithm, and under ``copy`` of the joined parts."""
        copied = self.weight.nbytes if len(self.references) > 1 else 0
        packed = list(self.by_algorithm.items())
        return {"copy": copied, **{name: weight.nbytes for name, weight in packed}}


def current(
    parts: Sequence[Tensor], kernel: tuple[int, int], combine: Combine = concatenate
) -> PackedWeight:
    """The packed weight of ``parts`` with their present contents."""
    key = (combine, *map(id, parts))
    weight = _packed.get(key)
    if weight is None or not weight.is_current(parts):
        with _lock:
            weight = _packed.get(key)
            if weight is None or not weight.is_current(parts):
                weight = _packed[key] = PackedWeight(parts, kernel, combine)
    return weight


class Watch:
    """The first call of a fused graph: takes all its parameters and returns their packed weights.

    Args:
        counts: how many parameters make up each packed weight.
        kernels: height and width of each packed weight.
        combines: the function that makes each weight of its parts; by default ``concatenate``.
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
        self.combines = list(combines or [concatenate] * len(self.kernels))
        self.last: tuple[int, list[weakref.ref[PackedWeight]]] | None = None

    def __call__(self, *weights: Tensor) -> list[PackedWeight | None]:
        """One packed weight for each of ``counts``."""
        # Read first: a write meanwhile then makes the state differ at the next call.
        state, last = weights_state(weights), self.last
        if last is not None and last[0] == state:
            alive = [reference() for reference in last[1]]
            if None not in alive:
                return alive
        packed = [
            current(weights[part], kernel, combine)
            for part, kernel, combine in zip(self.slices, self.kernels, self.combines, strict=True)
        ]
        self.last = state, [weakref.ref(weight) for weight in packed]
        return [*packed]
