"""A network that a peer has prepared for its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Prepared:
    """A network ready to be called.

    Attributes:
        call: the network as a function of its inputs.
        dtype: of floating-point inputs.
        layout: memory format of four-dimensional inputs.
        notes: remarks for the report.
    """

    call: Callable[..., Tensor]
    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format
    notes: list[str] = field(default_factory=list)

    def fit(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs in ``dtype`` and ``layout``; int64 inputs stay int64."""
        return tuple(
            value.to(
                self.dtype if value.is_floating_point() else value.dtype,
                memory_format=self.layout if value.ndim == 4 else torch.preserve_format,
            )
            for value in inputs
        )
