"""Sets of cases that one command measures and keeps in a file of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.turns.job import OURS, Case
from benchmarks.turns.report import Record
from benchmarks.unet import report, scaling

FROZEN = "inductor channels_last, frozen"


@dataclass(frozen=True)
class Suite:
    """Cases, and the peers that are timed on them.

    Attributes:
        cases: by the number of threads.
        peers: keys of ``PEERS``.
        text: the report of the records.
        warm: see ``turns.Settings``.
        draw: draws a picture of the records at the end, into the given folder of results; it is
            asked to draw nothing of no records first, so that what it lacks is known at once.
    """

    cases: Callable[[int], list[Case]]
    peers: tuple[str, ...]
    text: Callable[[list[Record]], str]
    warm: bool = False
    draw: Callable[[list[Record], Path], None] | None = None


def bfloat16(threads: int) -> list[Case]:
    """The CIFAR-10 U-Net in both dtypes, and larger networks in bfloat16."""
    small = [("cifar10", batch, dtype) for dtype in ("float32", "bfloat16") for batch in (1, 8)]
    large = [("sd15", 2, "bfloat16"), ("vae", 1, "bfloat16")]
    return [Case(*one, threads) for one in small + large]


SUITES = {
    "bfloat16": Suite(
        bfloat16,
        (OURS, "fastdiff bf16", "openvino", FROZEN, "eager channels_last"),
        lambda records: report.overview(records) + report.by_network(records),
        warm=True,
    ),
    "scaling": Suite(
        scaling.cases,
        (OURS, "openvino", FROZEN),
        scaling.text,
        draw=scaling.draw,
    ),
}
