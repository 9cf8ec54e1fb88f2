"""What a worker is asked to do, and the network that a peer has prepared for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """The calls that all peers are timed on.

    Attributes:
        network: a key of ``models.NETWORKS``.
        batch: number of images.
        dtype: a key of ``models.DTYPES``.
        threads: of every peer.
        size: height and width of the images; None for the network's own.
    """

    network: str
    batch: int
    dtype: str
    threads: int
    size: int | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What identifies the case in a report; threads are told where sizes vary."""
        key = {"network": self.network, "batch": self.batch, "dtype": self.dtype}
        return key if self.size is None else key | {"size": self.size, "threads": self.threads}

    @property
    def title(self) -> str:
        """For lines of progress and names of files."""
        title = f"{self.network}, batch {self.batch}, {self.dtype}"
        if self.size is None:
            return title
        plural = "" if self.threads == 1 else "s"
        return f"{title}, {self.size}x{self.size}, {self.threads} thread{plural}"


@dataclass(frozen=True)
class Job:
    """The task of a worker: one network, prepared by one peer.

    Attributes:
        case: the network and the calls.
        peer: a key of ``PEERS``, or ``worker.REFERENCE``.
        folder: for the peer's files, empty at its first start.
        expected: file of the inputs and of the output of eager float64.
        keep_heap: keep freed memory in the process.
    """

    case: Case
    peer: str
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
