"""The report of ``accelerate``: a row for each component, with what was done to it or why not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What became of one component.

    Attributes:
        component: its name in the pipeline, such as ``unet`` or ``vae.decoder``.
        kind: the name of its class.
        done: what was done to it; empty where it was left as it is.
        left: why it was left as it is; empty where something was done.
    """

    component: str
    kind: str
    done: str = ""
    left: str = ""


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` did to a pipeline or model; ``str()`` of it is a table.

    Attributes:
        target: the name of the class of the pipeline or model.
        precision: the precision in which compiled parts compute: ``fast``, ``strict`` or ``bf16``.
        rows: one for each component that computes.
    """

    target: str
    precision: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        cells = [("component", "class", "what was done")]
        cells += [(r.component, r.kind, r.done or f"left as it is: {r.left}") for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(2)]
        lines = [f"fastdiff.accelerate: {self.target}, precision {self.precision}"]
        lines += [f"  {a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}" for a, b, c in cells]
        return "\n".join(lines)
