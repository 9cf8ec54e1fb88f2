"""Weights that are computed from parameters alone, such as normalised ones, before they are packed.

A network that normalises its weights does so at every call. In a graph without gradients the result
stays the same from call to call, until one of the parameters changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Value:
    """A tensor within a computation: one of the parts, or behind these the result of a step."""

    index: int


@dataclass(frozen=True)
class Step:
    """A call of a function, or of a method by its name.

    Attributes:
        target: the function, or the name.
        args: its arguments; tuples may hold a ``Value`` too.
        kwargs: names and values of its keyword arguments.
    """

    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __call__(self, values: Sequence[Any]) -> Any:
        """The result, given the parts and the results of the steps before."""
        args = [_resolved(x, values) for x in self.args]
        kwargs = {name: _resolved(x, values) for name, x in self.kwargs}
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


@dataclass(frozen=True)
class Computed:
    """What computes a weight; in ``adapted_weights.OfAdapted`` it stands where adapters may.

    Attributes:
        parts: number of the parameters that it is computed from.
        steps: of the computation; the last gives the weight.
    """

    parts: int
    steps: tuple[Step, ...]

    __name__ = "computed_weight"
    __qualname__ = "computed_weight"

    def places(self) -> list[slice]:
        """The places among the parts of what is not the first."""
        return [slice(1, self.parts)]

    def numbers(self) -> Iterator[int]:
        """The places of parts of which the value counts and not the tensor: none."""
        return iter(())

    def resolved(self, parts: Sequence[Tensor]) -> tuple[list[Tensor], Computed]:
        """The parts, and what computes the weight of them."""
        return list(parts), self

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """The weight."""
        values: list[Any] = [part.detach() for part in parts]
        with torch.no_grad():
            for step in self.steps:
                values.append(step(values))
        return values[-1]


@dataclass(frozen=True)
class Scaled:
    """Makes a weight of one part: the part, times constants.

    Attributes:
        factors: numbers of input channels, and the constant of each of these groups.
    """

    factors: tuple[tuple[int, float], ...]

    def __call__(self, parts: Sequence[Tensor]) -> tuple[Tensor, None]:
        """The weight in float32, and no bias."""
        (part,) = parts
        weight = part.detach().float()
        if len(self.factors) == 1:
            return weight * self.factors[0][1], None
        row = torch.cat([weight.new_full((count,), factor) for count, factor in self.factors])
        return weight * row.view(1, -1, *[1] * (weight.ndim - 2)), None


def _resolved(x: Any, values: Sequence[Any]) -> Any:
    if isinstance(x, Value):
        return values[x.index]
    return tuple(_resolved(y, values) for y in x) if isinstance(x, tuple) else x
