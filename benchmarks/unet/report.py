"""unet.json, every figure, and unet.md, the tables. Saved after each new figure.

Records of earlier runs stay until their own network, batch size and dtype are run again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.rows import by_peer
from benchmarks.tables import markdown
from benchmarks.unet.breakdown_tables import breakdown_tables, number
from benchmarks.unet.models import NETWORKS
from benchmarks.unet.peers import OURS

Record = dict[str, Any]
KEY = ("kind", "network", "batch", "dtype")


class Report:
    """Records of runs, in a folder.

    Args:
        folder: of both files; an existing unet.json is read.
    """

    def __init__(self, folder: Path) -> None:
        self.json, self.markdown = folder / "unet.json", folder / "unet.md"
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

    def text(self) -> str:
        """All tables, as Markdown."""
        parts = []
        for network in dict.fromkeys(r["network"] for r in self.records):
            mine = [r for r in self.records if r["network"] == network]
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


def _details(record: Record) -> str:
    """A table of all figures of each peer in one run."""
    ours = _ours(record)
    rows = []
    for r in record["rows"]:
        times = r["times"]
        ratio = r["median"] / ours if ours and times else None
        quick, slow = (f(times) if times else None for f in (min, max))
        rows.append(
            [
                r["peer"],
                number(r["median"] and 1e3 * r["median"]),
                number(ratio, "{:.2f}x"),
                f"{1e3 * quick:.1f} to {1e3 * slow:.1f}" if quick and slow else "",
                str(len(times) or ""),
                number(r["error"], "{:.1e}"),
                number(r["first_call"]),
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
        markdown([head, *rows]),
        "Error: largest difference from eager float64, as a share of the largest output. Peak: "
        "resident memory with compilation; running: since the first calls.",
    ]
    if record["disturbed"] > 0.02:
        lines.append(
            f"Waiting processes took up to {record['disturbed']:.0%} of a core during a turn."
        )
    return "\n".join(lines) + "\n"


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
    return tuple(record[name] for name in KEY)


def _order(record: Record) -> tuple[Any, ...]:
    networks = list(NETWORKS)
    return networks.index(record["network"]), record["dtype"] != "float32", record["batch"]


def _write(path: Path, text: str) -> None:
    """Write a file; if the run is interrupted, the earlier file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
