"""The options of the command line that all benchmarks in turns have, and the beginning of a run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from benchmarks import machine, tables
from benchmarks.turns.job import DTYPES, Case
from benchmarks.turns.report import Report
from benchmarks.turns.run import Run, Settings, say

BUSY = 0.5  # load average above which other work is likely to disturb the figures


def begin() -> None:
    """Warn of a busy machine, and end the workers when this process is terminated."""
    # SIGTERM raises SystemExit, so that the workers are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load = os.getloadavg()[0]
    if load > BUSY:
        say(f"this machine is busy: a load of {load:.2f}, at most {BUSY} is wanted for figures")


def measure(
    args: argparse.Namespace,
    report: Report,
    cases: Sequence[Case],
    peers: Collection[str],
    run: type[Run],
    breakdown: str | None = None,
) -> None:
    """Measure what the command line asks for, print the tables, and publish them.

    Args:
        args: of :func:`parser`.
        report: where the figures go; it holds those of one processor.
        cases: all that were asked for.
        peers: names of all peers.
        run: the run of a case.
        breakdown: the peer whose calls are broken down; None for none.
    """
    begin()
    facts = machine.facts(args.threads)
    report.keep_processor(facts)
    with tempfile.TemporaryDirectory(prefix="fastdiff-turns-") as scratch:
        settings = Settings(
            rounds=args.rounds, limit=args.limit, keep_heap=not args.plain_heap, warm=False,
            breakdown=breakdown, folder=args.logs or Path(scratch),
        )  # fmt: skip
        say(machine.line(facts))
        for case in report.remaining(cases, args.resume):
            chosen = [name for name in peers if name in (args.peers or peers)]
            run(case, chosen, settings, report.put).run()
    print(report.text())
    tables.publish(args.out)


def parser(program: str, text: str | None, peers: Iterable[str]) -> argparse.ArgumentParser:
    """A parser with the common options.

    Args:
        program: the command.
        text: its description, the files in ``--out`` included.
        peers: names of all peers.
    """
    options = argparse.ArgumentParser(
        prog=program,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="peers:\n  " + "\n  ".join(peers),
    )
    options.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), metavar="FOLDER",
        help="for the figures and their tables; default %(default)s",
    )  # fmt: skip
    options.add_argument(
        "--resume", action="store_true",
        help="leave out the cases that the file of figures has already",
    )  # fmt: skip
    options.add_argument(
        "--peers", nargs="+", choices=peers, metavar="PEER",
        help="peers from the list below; default all peers of the network",
    )  # fmt: skip
    options.add_argument(
        "--batches", nargs="+", type=positive, metavar="N", help="default the network's own"
    )
    options.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=" or ".join(DTYPES)
    )
    options.add_argument(
        "--threads", type=positive, default=machine.cores(), metavar="N",
        help="of every peer; default all cores, %(default)s here",
    )  # fmt: skip
    options.add_argument(
        "--rounds", type=positive, default=9, metavar="N",
        help="turns of each peer; slow peers and large networks take fewer; default %(default)s",
    )  # fmt: skip
    options.add_argument(
        "--limit", type=float, default=1200, metavar="SECONDS",
        help="longest time to wait for a peer's answer; default %(default)s",
    )  # fmt: skip
    options.add_argument(
        "--logs",
        type=_new_folder,
        metavar="FOLDER",
        help="keep what the processes write, in a folder that is new or empty",
    )
    options.add_argument(
        "--plain-heap", action="store_true",
        help="let glibc return freed memory to the system; by default the process keeps it, which "
        "makes every peer faster that allocates memory in its calls",
    )  # fmt: skip
    return options


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {value}")
    return value


def _new_folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and any(path.iterdir()):
        raise argparse.ArgumentTypeError(f"wanted a folder that is new or empty, got {text}")
    return path.absolute()
