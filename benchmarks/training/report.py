"""The files of figures of training steps, and their tables as Markdown."""

from __future__ import annotations

from pathlib import Path

from benchmarks import rows
from benchmarks.tables import markdown
from benchmarks.training.tasks import TASKS
from benchmarks.turns import report
from benchmarks.turns.parts import parts_table, rest_table
from benchmarks.turns.report import Record, details, machines

COLUMNS = (
    "Error: relative L2 norm of the difference of the first step's gradient from eager float64. "
    "First call: seconds to the first gradient. Peak: resident memory with compilation; running: "
    "since the first steps."
)


class Report(report.Report):
    """training.json and training.md, in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "training", text, list(TASKS))


def text(records: list[Record]) -> str:
    """The times and memory of all cases, then all figures of each case."""
    results = {"records": records}
    lines = [
        "## All cases\n",
        machines(records),
        "Milliseconds a training step (time over fastdiff's), medians in turns.\n",
        markdown(rows.training_steps(results)),
        "Resident memory in MiB while it runs (memory over fastdiff's).\n",
        markdown(rows.training_memory(results)),
    ]
    for network in dict.fromkeys(r["network"] for r in records):
        lines.append(f"## {TASKS[network].network.title}\n")
        mine = [r for r in records if r["network"] == network]
        lines += [details(r, COLUMNS) for r in mine if r["kind"] == "call"]
        lines += [_breakdown(r) for r in mine if r["kind"] == "breakdown"]
    return "\n".join(lines)


def _breakdown(record: Record) -> str:
    title = f"### Where the time of {record['peer']} goes: batch {record['batch']}, "
    return "\n".join(
        [f"{title}{record['dtype']}\n", parts_table(record), *filter(None, [rest_table(record)])]
    )
