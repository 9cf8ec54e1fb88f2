"""What is timed, and what a worker is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REFERENCE = "reference"  # the job that computes what is expected
OURS = "fastdiff"  # the peer whose time the others are compared with


@dataclass(frozen=True)
class Case:
    """The calls, or training steps, that all peers are timed on.

    Attributes:
        network: its name in the benchmark.
        batch: number of images.
        dtype: a key of ``DTYPES``.
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
        peer: its name in the benchmark, or ``REFERENCE``.
        folder: for the peer's files, empty at its first start.
        expected: file of the inputs and of what eager float64 makes of them.
        keep_heap: keep freed memory in the process.
    """

    case: Case
    peer: str
    folder: Path
    expected: Path
    keep_heap: bool
