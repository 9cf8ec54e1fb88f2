"""Every figure as JSON, and the tables as Markdown. Saved after each new figure.

Records of earlier runs stay until their own case is run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine, rows
from benchmarks.rows import by_peer
from benchmarks.tables import markdown
from benchmarks.unet.breakdown_tables import breakdown_tables, number
from benchmarks.unet.job import Case
from benchmarks.unet.models import NETWORKS
from benchmarks.unet.peers import OURS

Record = dict[str, Any]
KEY = ("kind", "network", "batch", "dtype", "size", "threads")


class Report:
    """Records of runs, in a folder.

    Args:
        folder: of both files; existing figures are read.
        stem: of the files' names.
        text: the tables of the records, as Markdown; ``by_network`` unless given.
    """

    def __init__(
        self, folder: Path, stem: str = "unet", text: Callable[[list[Record]], str] | None = None
    ) -> None:
        self.json, self.markdown = folder / f"{stem}.json", folder / f"{stem}.md"
        self._text = text or by_network
        self.records: list[Record] = []
        if self.json.is_file():
            self.records = json.loads(self.json.read_text(encoding="utf-8"))["records"]

    def put(self, record: Record) -> None:
        """Add a record, which replaces an earlier record of the same run, and save both files."""
        # Converted to JSON and back, so that a new record is the same as one read from the file.
        record = json.loads(json.dumps(record))
        self.records = [r for r in self.records if _key(r) != _key(record)] + [record]
        self.records.sort(key=_order)
        _write(self.json, json.dumps({"records": self.records}, indent=1) + "\n")
        _write(self.markdown, self.text())

    def keep(self, wanted: Callable[[Record], bool]) -> int:
        """Leave out the records that are not wanted; the next ``put`` saves that.

        Returns:
            How many were left out.
        """
        before = len(self.records)
        self.records = [r for r in self.records if wanted(r)]
        return before - len(self.records)

    def has(self, case: Case) -> bool:
        """Whether the case was timed to its end; a peer's failure is an end too."""
        names = KEY[1:]
        wanted = [case.key.get(name) for name in names]
        return any(
            r["kind"] == "call" and r.get("finished") and [r.get(n) for n in names] == wanted
            for r in self.records
        )

    def text(self) -> str:
        """All tables, as Markdown."""
        return self._text(self.records)


def by_network(records: list[Record]) -> str:
    """For each network the times of all peers, then all figures of each case."""
    parts = []
    for network in dict.fromkeys(r["network"] for r in records):
        mine = [r for r in records if r["network"] == network]
        parts.append(f"## {NETWORKS[network].title}\n")
        parts.append(_facts(mine))
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
        parts += [_details(r) for r in calls]
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


def machines(records: list[Record]) -> str:
    """What the figures were measured on."""
    lines = map(machine.line, rows.machines({"records": records}))
    return "; and ".join(dict.fromkeys(lines)) + ".\n"


def _details(record: Record) -> str:
    """A table of all figures of each peer in one run."""
    ours = _ours(record)
    table = []
    for r in record["rows"]:
        times = r["times"]
        ratio = r["median"] / ours if ours and times else None
        quick, slow = (f(times) if times else None for f in (min, max))
        table.append(
            [
                r["peer"],
                number(r["median"] and 1e3 * r["median"]),
                number(ratio, "{:.2f}x"),
                f"{1e3 * quick:.1f} to {1e3 * slow:.1f}" if quick and slow else "",
                str(len(times) or ""),
                number(r["error"], "{:.1e}"),
                _first_call(r),
                number(r["peak_memory"], "{:.0f}"),
                number(r["running_memory"], "{:.0f}"),
                "; ".join(filter(None, [r["failed"], *r["notes"]])).replace("|", "/"),
            ]
        )
    head = [
        "peer", "ms", "ratio", "range, ms", "calls", "error", "first call, s", "peak, MiB",
        "running, MiB", "note",
    ]  # fmt: skip
    lines = [
        f"### Batch {record['batch']}, {record['dtype']}\n",
        markdown([head, *table]),
        "Error: largest difference from eager float64, as a share of the largest output. Peak: "
        "resident memory with compilation; running: since the first calls.",
    ]
    if any(r.get("warm_first_call") for r in record["rows"]):
        lines.append("First call: with empty caches, and with those of an earlier process.")
    if record["disturbed"] > 0.02:
        lines.append(
            f"Waiting processes took up to {record['disturbed']:.0%} of a core during a turn."
        )
    return "\n".join(lines) + "\n"


def _first_call(row: Record) -> str:
    warm = row.get("warm_first_call")
    return number(row["first_call"]) + (f", {warm:.1f}" if warm else "")


def _ours(record: Record) -> float | None:
    mine = (r for r in record["rows"] if r["peer"] == OURS and not r["failed"])
    return next((r["median"] for r in mine), None)


def _facts(records: list[Record]) -> str:
    """The machine of the figures; with several machines, each with its figures."""
    titles_of: dict[str, list[str]] = {}
    for r in records:
        title = f"{r['kind']} at batch {r['batch']}, {r['dtype']}"
        titles_of.setdefault(machine.line(r["machine"]) + ".", []).append(title)
    if len(titles_of) == 1:
        return next(iter(titles_of)) + "\n"
    return "\n".join(f"- {'; '.join(titles)}: {line}" for line, titles in titles_of.items()) + "\n"


def _errors(record: Record) -> str:
    timed = (r for r in record["rows"] if r["error"] is not None)
    errors = ", ".join(f"{r['peer']} {r['error']:.1e}" for r in timed)
    return f"batch {record['batch']}, {record['dtype']}: {errors}"


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in KEY)


def _order(record: Record) -> tuple[Any, ...]:
    networks = list(NETWORKS)
    place = networks.index(record["network"]), record["dtype"] != "float32", record["batch"]
    return *place, record.get("size", 0), record.get("threads", 0)


def _write(path: Path, text: str) -> None:
    """Write a file; if the run is interrupted, the earlier file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
