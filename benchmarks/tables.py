"""The tables of figures in the documentation, each rendered from a stored measurement.

A page holds a table between two comments, and nobody edits what stands there:

    <!-- table: NAME -->
    <!-- end -->

``TABLES`` names, for each table, the command that measures its figures, the file in
benchmarks/results where that command keeps them, and the function that makes rows of them. The
command calls :func:`publish` at its end. ``python -m benchmarks.tables`` renders all tables anew,
for example after a change to a function that makes rows; it measures nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, rows
from benchmarks.rows import Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(?<=<!-- table: )([a-z0-9-]+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """A table of the documentation.

    Attributes:
        command: what a reader types to measure the figures again.
        results: the file of figures in ``RESULTS``, without its ending ``.json``.
        rows: the file's content as rows of cells, the head first.
        numbers: whether all columns but the first are aligned to the right.
        picture: of the same figures, shown above the table: its path from docs, and what it is of.
    """

    command: str
    results: str
    rows: Callable[[Any], list[Row]]
    numbers: bool = True
    picture: tuple[str, str] | None = None

    @property
    def file(self) -> Path:
        """Where the figures are kept; there is none before the command's first run."""
        return RESULTS / f"{self.results}.json"

    def text(self) -> str:
        """The table in Markdown, and a line that says how, where and when it was measured."""
        if not self.file.exists():
            return f"\n*Not measured yet: `{self.command}`.*\n\n"
        results = json.loads(self.file.read_text(encoding="utf-8"))
        shown = "\n![{1}]({0})\n".format(*self.picture) if self.picture else ""
        taken = "; and ".join(machine.line(facts) for facts in rows.machines(results))
        table = markdown(self.rows(results), self.numbers)
        return f"{shown}\n{table}\n*`{self.command}`: {taken}.*\n\n"


TABLES = {
    "unet": Table("make bench-unet", "unet", rows.unet_calls),
    "unet-errors": Table("make bench-unet", "unet", rows.unet_errors),
    "unet-sampling": Table("make bench-unet", "unet", rows.unet_sampling),
    "other-networks": Table(
        'make bench-unet UNET="--models sd15 vae"', "unet", rows.other_networks
    ),
    "signals-and-videos": Table(
        "python -m benchmarks.signals_and_videos --out benchmarks/results",
        "signals_and_videos",
        rows.signals_and_videos,
    ),
    "bfloat16": Table("make bench-bf16", "bfloat16", rows.bfloat16_calls),
    "bfloat16-memory": Table("make bench-bf16", "bfloat16", rows.bfloat16_memory),
    "bfloat16-first-calls": Table("make bench-bf16", "bfloat16", rows.bfloat16_first_calls),
    "scaling": Table(
        "make scaling",
        "scaling",
        rows.scaling,
        picture=("images/scaling.png", "Time against batch, image size and threads"),
    ),
    "pipelines": Table("make bench-pipelines", "pipelines", rows.pipelines),
    "training": Table("make bench-train", "training", rows.training_steps),
    "training-memory": Table("make bench-train", "training", rows.training_memory),
    "training-parts": Table("make bench-train", "training", rows.training_parts),
    "learning": Table(
        "make learning",
        "learning",
        rows.learning,
        picture=("images/learning.png", "Losses and Fréchet distances of eager and compiled runs"),
    ),
    "operations": Table("make bench", "operations", rows.operations),
    "training-objective": Table("make bench", "operations", rows.training_objective),
    "whole-models": Table("make bench", "operations", rows.whole_models),
    "sampling-loop": Table("make bench", "operations", rows.sampling_loop),
    "scheduler-steps": Table("make bench", "operations", rows.scheduler_steps),
    "sampler-quality": Table("make quality", "sampler_quality", rows.sampler_quality),
    "shipped-model": Table("make quality", "sampler_quality", rows.shipped_model),
    "emoji-model": Table("make emoji-quality", "emoji_quality", rows.emoji_quality),
    "objectives": Table("make theory", "objectives", rows.objectives, numbers=False),
    "guidance": Table("make theory", "guidance", rows.guidance),
    "few-steps": Table("make few-step", "few_steps", rows.few_steps),
    "adaptive-steps": Table("make theory", "adaptive_steps", rows.adaptive_steps),
    "ode-errors": Table("make theory", "adaptive_steps", rows.ode_errors),
    "gpu-kernels": Table("make gpu-audit", "gpu_audit", rows.gpu_kernels, numbers=False),
    "gpu-bytes": Table("make gpu-audit", "gpu_audit", rows.gpu_bytes, numbers=False),
}


def markdown(cells: list[Row], numbers: bool = True) -> str:
    """Rows of cells, the head first, as a Markdown table."""
    head, *body = ("| " + " | ".join(row) + " |\n" for row in cells)
    rule = "|---" + ("|---:" if numbers else "|---") * (len(cells[0]) - 1) + "|\n"
    return "".join([head, rule, *body])


def pages() -> Iterator[Path]:
    """The documentation: README.md and the pages in docs."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


def rendered(page: str) -> str:
    """A page's text with every table in it as the stored figures have it.

    Raises:
        KeyError: the page wants a table that ``TABLES`` does not have.
    """
    return BLOCK.sub(lambda block: block[1] + block[2] + TABLES[block[1]].text(), page)


def picture_folder(results: Path) -> Path:
    """The folder of a picture: docs/images for the documentation's figures, else beside them."""
    return ROOT / "docs" / "images" if results.resolve() == RESULTS else results


def publish(folder: Path | str) -> None:
    """Render the documentation's tables, if ``folder`` is where their figures are kept.

    A command that measures calls this with the folder that it wrote to: a trial run writes
    elsewhere and leaves the documentation as it is.
    """
    if Path(folder).resolve() != RESULTS:
        return
    for page in pages():
        text = page.read_text(encoding="utf-8")
        page.write_text(rendered(text), encoding="utf-8")


if __name__ == "__main__":
    publish(RESULTS)
