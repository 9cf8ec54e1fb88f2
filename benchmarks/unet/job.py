"""What a worker is asked to do, and the network that a peer has prepared for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """The task of a worker: one network, prepared by one peer.

    Attributes:
        network: a key of ``models.NETWORKS``.
        peer: a key of ``PEERS``, or ``worker.REFERENCE``.
        batch, dtype, threads: of the calls.
        folder: for the peer's files, empty at its first start.
        expected: file of the inputs and of the output of eager float64.
        keep_heap: keep freed memory in the process.
    """

    network: str
    peer: str
    batch: int
    dtype: str
    threads: int
    folder: Path
    expected: Path
    keep_heap: bool


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
