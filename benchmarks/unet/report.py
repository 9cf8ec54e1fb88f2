"""The tables of a U-Net's calls, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import by_peer
from benchmarks.tables import markdown
from benchmarks.turns import report
from benchmarks.turns.report import Record, details, facts, machines
from benchmarks.unet.breakdown_tables import breakdown_tables
from benchmarks.unet.models import NETWORKS

COLUMNS = (
    "Error: largest difference from eager float64, as a share of the largest output. Peak: "
    "resident memory with compilation; running: since the first calls."
)


class Report(report.Report):
    """Records of runs, in a folder.

    Args:
        folder: of both files; existing figures are read.
        stem: of the files' names.
        text: the tables of the records, as Markdown; ``by_network`` unless given.
    """

    def __init__(
        self, folder: Path, stem: str = "unet", text: Callable[[list[Record]], str] | None = None
    ) -> None:
        super().__init__(folder, stem, text or by_network, list(NETWORKS))


def by_network(records: list[Record]) -> str:
    """For each network the times of all peers, then all figures of each case."""
    parts = []
    for network in dict.fromkeys(r["network"] for r in records):
        mine = [r for r in records if r["network"] == network]
        parts.append(f"## {NETWORKS[network].title}\n")
        parts.append(facts(mine))
        calls = [r for r in mine if r["kind"] == "call"]
        loops = [r for r in mine if r["kind"] == "sampling"]
        if calls:
            parts.append("Milliseconds a call (time over fastdiff's), medians in turns.\n")
            parts.append(markdown(by_peer(calls, 1e3)))
        if loops:
            steps = ", ".join(sorted({str(r["steps"]) for r in loops}))
            parts.append(f"Seconds for {steps} steps of DDIM (time over fastdiff's).\n")
            parts.append(markdown(by_peer(loops, 1)))
            parts.append(
                "Largest difference from the images of eager float32, as a share of their "
                "largest value: " + "; ".join(map(_errors, loops)) + ".\n"
            )
        parts += [details(r, COLUMNS) for r in calls]
        parts += [breakdown_tables(r) for r in mine if r["kind"] == "breakdown"]
    return "\n".join(parts)


def overview(records: list[Record]) -> str:
    """Times, memory and first calls of every case in three tables."""
    results = {"records": records}
    return "\n".join(
        [
            "## All cases\n",
            machines(records),
            "Milliseconds a call (time over fastdiff's), medians in turns.\n",
            markdown(rows.bfloat16_calls(results)),
            "Resident memory in MiB: while it runs, and the peak, compilation included.\n",
            markdown(rows.bfloat16_memory(results)),
            "First call in seconds: with empty caches, and in a process that finds the caches of "
            "an earlier one.\n",
            markdown(rows.bfloat16_first_calls(results)),
            "",
        ]
    )


def _errors(record: Record) -> str:
    timed = (r for r in record["rows"] if r["error"] is not None)
    errors = ", ".join(f"{r['peer']} {r['error']:.1e}" for r in timed)
    return f"batch {record['batch']}, {record['dtype']}: {errors}"
