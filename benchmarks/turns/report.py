"""Every figure as JSON, and the tables as Markdown. Saved after each new figure.

Records of earlier runs stay until their own case is run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, rows
from benchmarks.tables import markdown
from benchmarks.turns.job import OURS, Case
from benchmarks.turns.run import say

Record = dict[str, Any]
KEY = ("kind", "network", "batch", "dtype", "size", "threads")


class Report:
    """Records of runs, in a folder.

    Args:
        folder: of both files; existing figures are read.
        stem: of the files' names.
        text: the tables of the records, as Markdown.
        networks: names, in the order of the records.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        text: Callable[[list[Record]], str],
        networks: Sequence[str],
    ) -> None:
        self.json, self.markdown = folder / f"{stem}.json", folder / f"{stem}.md"
        self._text, self._networks = text, list(networks)
        self.records: list[Record] = []
        if self.json.is_file():
            self.records = json.loads(self.json.read_text(encoding="utf-8"))["records"]

    def put(self, record: Record) -> None:
        """Add a record, which replaces an earlier record of the same run, and save both files."""
        # Converted to JSON and back, so that a new record is the same as one read from the file.
        record = json.loads(json.dumps(record))
        self.records = [r for r in self.records if _key(r) != _key(record)] + [record]
        self.records.sort(key=self._order)
        _write(self.json, json.dumps({"records": self.records}, indent=1) + "\n")
        _write(self.markdown, self.text())

    def keep_processor(self, facts: dict[str, Any]) -> None:
        """Leave out the records of another processor; the next ``put`` saves that.

        Args:
            facts: of this machine, see ``machine.facts``.
        """
        kept = [r for r in self.records if machine.same(r["machine"], facts)]
        if left_out := len(self.records) - len(kept):
            say(f"{self.json}: {left_out} records of another processor will be left out")
        self.records = kept

    def remaining(self, cases: Sequence[Case], resume: bool) -> Iterator[Case]:
        """The cases to measure, each announced; with ``resume`` those that are not here yet."""
        for number, case in enumerate(cases, 1):
            if resume and self.has(case):
                say(f"{case.title}: already in {self.json}")
                continue
            say(f"{case.title}: case {number} of {len(cases)}")
            yield case

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

    def _order(self, record: Record) -> tuple[Any, ...]:
        place = self._networks.index(record["network"]), record["dtype"] != "float32"
        return *place, record["batch"], record.get("size", 0), record.get("threads", 0)


def number(value: float | None, pattern: str = "{:.1f}") -> str:
    """A figure, or nothing."""
    return "" if value is None else pattern.format(value)


def machines(records: list[Record]) -> str:
    """What the figures were measured on."""
    lines = map(machine.line, rows.machines({"records": records}))
    return "; and ".join(dict.fromkeys(lines)) + ".\n"


def facts(records: list[Record]) -> str:
    """The machine of the figures; with several machines, each with its figures."""
    titles_of: dict[str, list[str]] = {}
    for r in records:
        title = f"{r['kind']} at batch {r['batch']}, {r['dtype']}"
        titles_of.setdefault(machine.line(r["machine"]) + ".", []).append(title)
    if len(titles_of) == 1:
        return next(iter(titles_of)) + "\n"
    return "\n".join(f"- {'; '.join(titles)}: {line}" for line, titles in titles_of.items()) + "\n"


def details(record: Record, explained: str) -> str:
    """A table of all figures of each peer in one run.

    Args:
        record: of the kind "call".
        explained: what the columns of the table are.
    """
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
        explained,
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


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in KEY)


def _write(path: Path, text: str) -> None:
    """Write a file; if the run is interrupted, the earlier file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
