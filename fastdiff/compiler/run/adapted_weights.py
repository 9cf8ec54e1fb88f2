"""Weights with LoRA's products of low rank: W + s_1 B_1 A_1 + s_2 B_2 A_2 + ...

An adapted weight is made of a sequence of tensors: W [K, C, ...], and for each adapter
A [R, C, ...], B [K, R, ...] and the numbers that its scale is made of, tensors without dimensions.
The numbers are read whenever the weight is asked for, and the sum is computed if one has changed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fastdiff.compiler.run.computed_weights import Computed

# Computes a weight [K, C, ...], and a bias [K] or None, from the parts.
Combine = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Scale:
    """The scale of an adapter: a constant, times or divided by numbers that may change.

    Attributes:
        constant: the constant.
        divides: for each of the numbers whether the scale is divided by it.
    """

    constant: float
    divides: tuple[bool, ...] = ()

    def resolved(self, numbers: Sequence[Tensor]) -> Scale:
        """The scale with the present numbers, as a constant of float32.

        PEFT multiplies scales by a number before a call and divides them by it afterwards, so that
        they drift by units of float64. That must change no weight.
        """
        value = self.constant
        for number, divides in zip(numbers, self.divides, strict=True):
            value = value / float(number) if divides else value * float(number)
        return Scale(*struct.unpack("f", struct.pack("f", value)))


@dataclass(frozen=True)
class Adapted:
    """Which parts an adapted weight has.

    Attributes:
        scales: of its adapters.
    """

    scales: tuple[Scale, ...]

    __name__ = "adapted"
    __qualname__ = "adapted"

    def places(self) -> list[slice]:
        """Those of each adapter's tensors among the parts."""
        counts = (2 + len(scale.divides) for scale in self.scales)
        return [slice(a, b) for a, b in pairwise(accumulate(counts, initial=1))]

    def numbers(self) -> Iterator[int]:
        """The places of the numbers among the parts."""
        for place in self.places():
            yield from range(place.start + 2, place.stop)

    def resolved(self, parts: Sequence[Tensor]) -> tuple[list[Tensor], Adapted]:
        """The parts without numbers, and what has these numbers' present values."""
        adapters = [parts[place] for place in self.places()]
        pairs = zip(self.scales, adapters, strict=True)
        scales = tuple(scale.resolved(adapter[2:]) for scale, adapter in pairs)
        return [parts[0], *(x for a, b, *_ in adapters for x in (a, b))], Adapted(scales)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """The adapted weight in float32, of parts without numbers."""
        weight, *factors = (part.detach().float() for part in parts)
        flat = weight.flatten(1)
        for scale, a, b in zip(self.scales, factors[::2], factors[1::2], strict=True):
            flat = torch.addmm(flat, b.flatten(1), a.flatten(1), alpha=scale.constant)
        return flat.view_as(weight)


@dataclass(frozen=True)
class OfAdapted:
    """Makes a weight of several, some of which are adapted or computed.

    Attributes:
        combine: makes the weight of these.
        adapters: for each of them what it is, or None for a parameter that stays as it is.
    """

    combine: Combine
    adapters: tuple[Adapted | Computed | None, ...]

    def places(self) -> list[slice]:
        """The places of each weight's parts among all parts."""
        counts = (1 if a is None else [1, *(p.stop for p in a.places())][-1] for a in self.adapters)
        return [slice(a, b) for a, b in pairwise(accumulate(counts, initial=0))]

    def weights(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The weights before they are adapted, or the first parts of those that are computed."""
        return [parts[place.start] for place in self.places()]

    def numbers(self) -> Iterator[int]:
        """The places of the numbers among all parts."""
        for place, adapter in zip(self.places(), self.adapters, strict=True):
            if adapter is not None:
                yield from (place.start + i for i in adapter.numbers())

    def resolved(self, parts: Sequence[Tensor]) -> tuple[list[Tensor], OfAdapted]:
        """The parts without numbers, and what has these numbers' present values."""
        tensors: list[Tensor] = []
        adapters: list[Adapted | Computed | None] = []
        for place, adapter in zip(self.places(), self.adapters, strict=True):
            held = parts[place]
            if adapter is not None:
                held, adapter = adapter.resolved(held)
            tensors += held
            adapters.append(adapter)
        return tensors, OfAdapted(self.combine, tuple(adapters))

    def __call__(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The weight and its bias, of parts without numbers."""
        pairs = zip(self.places(), self.adapters, strict=True)
        return self.combine(
            [parts[at.start] if adapter is None else adapter(parts[at]) for at, adapter in pairs]
        )
