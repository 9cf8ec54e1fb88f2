"""The files of figures of whole pipelines, and their tables as Markdown."""

from __future__ import annotations

from pathlib import Path

from benchmarks import rows
from benchmarks.pipelines.pipes import PIPES
from benchmarks.tables import markdown
from benchmarks.turns import report
from benchmarks.turns.report import Record, details, machines

COLUMNS = (
    "Error: relative L2 norm of the images' difference from eager float64. First call: seconds to "
    "the first images. Peak: resident memory with compilation; running: since the first calls."
)


class Report(report.Report):
    """pipelines.json and pipelines.md, in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "pipelines", text, list(PIPES))


def text(records: list[Record]) -> str:
    """The times of all cases, then all figures of each case."""
    lines = [
        "## All cases\n",
        machines(records),
        "Seconds a call (time over fastdiff's), medians in turns.\n",
        markdown(rows.pipelines({"records": records})),
    ]
    for network in dict.fromkeys(r["network"] for r in records):
        lines.append(f"## {PIPES[network].title}\n")
        lines += [details(r, COLUMNS) for r in records if r["network"] == network]
    return "\n".join(lines)
