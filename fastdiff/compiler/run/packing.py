"""Packed weights of the convolutions: packed once, and again when the parameters have changed.

A packed weight belongs to its parameters, not to a graph: graphs for other input sizes share it,
and it is freed when the parameters are freed. It is packed straight from the parameters, in
whatever dtype these are: nothing is rounded twice. ``fastdiff.ops.weights_state`` tells whether
parameters have changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.run.adapted_weights import Combine, OfAdapted
from fastdiff.ops.conv2d import conv2d_pack
from fastdiff.ops.weights_state import drop_weights, weights_state

DROPPED = (
    "the weight was dropped after it had been packed for fastdiff's kernels, as the option "
    "drop_weights of torch.compile says: it can be neither read nor saved, nor packed in another "
    "form. Load the model again without the option, or give it new weights "
    "(load_state_dict(..., assign=True))"
)
_lock = threading.RLock()
_packed: dict[tuple[Any, ...], PackedWeight] = {}


@dataclass(frozen=True)
class Converted:
    """Converts a single parameter to ``dtype``."""

    dtype: torch.dtype

    def __call__(self, parts: Sequence[Tensor]) -> tuple[Tensor, None]:
        """The converted parameter, and no bias."""
        (part,) = parts
        return part.detach().to(self.dtype), None


def concatenate(parts: Sequence[Tensor]) -> tuple[Tensor, None]:
    """The parts, concatenated along the output channels, and no bias."""
    weights = [part.detach() for part in parts]
    return weights[0] if len(weights) == 1 else torch.cat(weights), None


def _fills_its_storage(x: Tensor) -> bool:
    dense = x.is_contiguous() or (
        x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )
    return dense and x.untyped_storage().nbytes() == x.nbytes


def _key(parts: Sequence[Tensor], combine: Combine) -> tuple[Any, ...]:
    """The place of a packed weight among all.

    All adapted weights of the same layers have one place: those of adapters that were switched off,
    or rescaled, give their memory to the present ones.
    """
    if isinstance(combine, OfAdapted):
        return (OfAdapted, combine.combine, *map(id, combine.weights(parts)))
    return (combine, *map(id, parts))


class PackedWeight:
    """A weight made of one or several parameters, as they are when it is made.

    A weight that is computed from the parts is kept only until it is packed: the kernels read the
    packed form alone.

    Args:
        parts: the parameters.
        kernel: height and width of the weight; None for a parameter that is no weight of a
            convolution, which keeps its shape.
        combine: computes the weight from the parts; instances that compute the same are equal.

    Attributes:
        droppable: whether the parts' own memory may be freed once they are packed, because no
            call of a graph reads anything but the packed form.
        is_dropped: whether it has been freed. No other form can be packed then.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        kernel: tuple[int, int] | None,
        combine: Combine = concatenate,
    ) -> None:
        self.key = _key(parts, combine)
        self.references = [weakref.ref(part, self._forget) for part in parts]
        # Read before packing: a write during packing then makes the state differ at the next call.
        self.state = weights_state(parts)
        self.kernel, self.combine = kernel, combine
        self.copied = combine is not concatenate or len(parts) > 1
        self.droppable = self.is_dropped = False
        self.by_algorithm: dict[str, Tensor] = {}
        self.by_dtype: dict[torch.dtype, Tensor] = {}
        self._made: Tensor | None = None
        self._bias: Tensor | None = None
        self._knows_bias = combine is concatenate  # which gives none
        self._keeps_made = False  # for operations that read it at every call
        self._is_read = False  # by other than the kernels

    # Parameters may live until the interpreter exits, when the module's names are gone.
    def _forget(self, _: object, lock: Any = _lock, packed: Any = _packed) -> None:
        with lock:
            if packed.get(self.key) is self:
                del packed[self.key]

    def is_current(self, parts: Sequence[Tensor], combine: Combine) -> bool:
        """Whether it is made of the same tensors with the same contents, in the same manner."""
        same = self.combine == combine and len(self.references) == len(parts)
        alive = same and all(
            ref() is part for ref, part in zip(self.references, parts, strict=True)
        )
        return alive and weights_state(parts) == self.state

    @property
    def weight(self) -> Tensor:
        """[K, C, R, S]; made of a single part, it shares that part's memory."""
        with _lock:
            self._keeps_made = self._is_read = True
            return self._make()

    @property
    def bias(self) -> Tensor | None:
        """[K], or None where ``combine`` gives none."""
        with _lock:
            if not self._knows_bias:
                self._make()
            return self._bias

    def tensors(self) -> Iterator[tuple[str | torch.dtype, Tensor]]:
        """What is in memory: packed forms by algorithm or dtype, ``weight`` and ``bias``."""
        yield from list(self.by_algorithm.items())
        yield from list(self.by_dtype.items())
        for name, x in (("weight", self._made), ("bias", self._bias)):
            if x is not None:
                yield name, x

    def _make(self) -> Tensor:
        """The weight, from the parts unless it is there."""
        if self._made is None:
            parts = [ref() for ref in self.references]
            flat, self._bias = self.combine(parts)  # type: ignore[arg-type]
            self._knows_bias = True
            self._made = flat if self.kernel is None else flat.view(*flat.shape[:2], *self.kernel)
        return self._made

    def packed(self, algorithm: str) -> Tensor:
        """The weight packed for an algorithm, by ``conv2d_pack`` at the first call."""
        packed = self.by_algorithm.get(algorithm)
        if packed is None:
            with _lock:
                packed = self.by_algorithm.get(algorithm)
                if packed is None:
                    packed = self.by_algorithm[algorithm] = conv2d_pack(self._make(), algorithm)
                    if not self._keeps_made:
                        self._made = None
                    self._drop()
        return packed

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The weight for PyTorch's own operation on tensors of ``dtype``, converted once."""
        with _lock:
            if dtype not in self.by_dtype:
                made, self._is_read = self._make(), True
                if made.dtype == dtype:
                    return self.weight
                self.by_dtype[dtype] = made.to(dtype)
            return self.by_dtype[dtype]

    def _drop(self) -> None:
        """Free the memory of the parts, where that is allowed."""
        parts = [part for ref in self.references if (part := ref()) is not None]
        if self.droppable and not self._is_read and all(map(_fills_its_storage, parts)):
            drop_weights(parts, DROPPED)
            self.is_dropped, self.state = True, weights_state(parts)

    def memory(self) -> dict[str, int]:
        """Bytes by algorithm, and under ``copy`` of what was joined or combined from the parts.

        ``plain`` are the copies in other dtypes that PyTorch's own operations read.
        """
        made = self._made
        copied = made.nbytes if made is not None and self.copied else 0
        packed = {name: weight.nbytes for name, weight in list(self.by_algorithm.items())}
        plain = sum(weight.nbytes for weight in list(self.by_dtype.values()))
        return {"copy": copied, "plain": plain, **packed}


def current(
    parts: Sequence[Tensor], kernel: tuple[int, int] | None, combine: Combine = concatenate
) -> PackedWeight:
    """The packed weight of ``parts`` with their present contents."""
    key = _key(parts, combine)
    weight = _packed.get(key)
    if weight is None or not weight.is_current(parts, combine):
        with _lock:
            weight = _packed.get(key)
            if weight is None or not weight.is_current(parts, combine):
                weight = _packed[key] = PackedWeight(parts, kernel, combine)
    return weight


def release(parameters: Iterable[Tensor]) -> None:
    """Free the packed weights that are made of any of ``parameters``.

    Graphs that are called again pack them again.
    """
    freed = set(map(id, parameters))
    with _lock:
        for key in [key for key in _packed if freed.intersection(key[1:])]:
            del _packed[key]


class Watch:
    """The first call of a fused graph: takes all its parameters and returns their packed weights.

    Attributes:
        slices: which of its arguments make up each packed weight.
        kernels: height and width of each packed weight; None where it keeps its shape.
        combines: the function that makes each weight of its parts.
        numbers: the indices of the arguments that are scales of adapters, of which the values count
            and not the tensors: Dynamo makes new ones at every call.
        droppable: the indices of the weights of which the graph reads nothing but the packed form,
            and whose parts' own memory is to be freed.
    """

    __name__ = "weights"
    __qualname__ = "weights"

    def __init__(self) -> None:
        self.slices: list[slice] = []
        self.kernels: list[tuple[int, int] | None] = []
        self.combines: list[Combine] = []
        self.numbers: set[int] = set()
        self.droppable: frozenset[int] = frozenset()
        self.last: tuple[Any, list[weakref.ref[PackedWeight]]] | None = None

    def add(self, count: int, kernel: tuple[int, int] | None, combine: Combine) -> int:
        """Take ``count`` more parameters, for one more weight, whose index is returned."""
        begin = self.slices[-1].stop if self.slices else 0
        self.slices.append(slice(begin, begin + count))
        self.kernels.append(kernel)
        self.combines.append(combine)
        if isinstance(combine, OfAdapted):
            self.numbers |= {begin + place for place in combine.numbers()}
        return len(self.slices) - 1

    def __call__(self, *weights: Tensor) -> list[PackedWeight | None]:
        """One packed weight for each of ``slices``."""
        # Read first: a write meanwhile then makes the state differ at the next call.
        state, last = self._state(weights), self.last
        if last is not None and last[0] == state:
            alive = [reference() for reference in last[1]]
            if None not in alive:
                return alive
        packed = []
        for part, kernel, combine in zip(self.slices, self.kernels, self.combines, strict=True):
            parts: Sequence[Tensor] = weights[part]
            if isinstance(combine, OfAdapted):
                parts, combine = combine.resolved(parts)
            packed.append(current(parts, kernel, combine))
        for index in self.droppable:
            packed[index].droppable = True
        self.last = state, [weakref.ref(weight) for weight in packed]
        return [*packed]

    def _state(self, weights: Sequence[Tensor]) -> Any:
        if not self.numbers:
            return weights_state(weights)
        tensors = [x for i, x in enumerate(weights) if i not in self.numbers]
        return weights_state(tensors), [float(weights[i]) for i in sorted(self.numbers)]
