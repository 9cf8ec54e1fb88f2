"""Show a run, or several side by side, on one page of HTML.

The page has curves, sample grids, options and machines, and needs no server. Each run writes one of
itself, report.html in its folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastdiff.cli.output import note
from fastdiff.training.run_report import REPORT, write


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff report``."""
    command.add_argument("--run", type=Path, required=True, help="folder of the run")
    command.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="RUN", help="folders of other runs"
    )
    command.add_argument(
        "--out", type=Path, help="the file to write; by default report.html in the folder of --run"
        ", or with --against comparison.html",
    )  # fmt: skip


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Write the page, and return the exit code."""
    target = args.out or args.run / ("comparison.html" if args.against else REPORT)
    write([args.run, *args.against], target)
    note(f"done: {target}")
    return 0
