"""Time whole training steps through fastdiff and through every peer, in turns.

    python -m benchmarks.training                             both networks, both dtypes
    python -m benchmarks.training --models digits             one network
    python -m benchmarks.training --models tiny --out /tmp/x  a quick test of the benchmark itself

A step is forward, loss, backward, AdamW and the running average of the weights. bfloat16 is
autocast with float32 weights. Run it from the repository's root, on a machine that does nothing
else. Each peer runs in its own process; the gradients of its first step are checked against eager
float64 before it is timed. The row of a peer that fails or takes too long says so. training.json
and training.md are saved in --out after every new figure, and hold figures of one processor.
Progress goes to standard error, the tables to standard output at the end.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import machine, tables
from benchmarks.training.peers import PEERS
from benchmarks.training.report import Report
from benchmarks.training.run import Run
from benchmarks.training.tasks import TASKS
from benchmarks.turns.job import DTYPES, OURS, Case
from benchmarks.turns.options import begin, parser
from benchmarks.turns.run import Settings, say

MEASURED = ("cifar10", "digits")


def main() -> None:
    args = _arguments()
    begin()
    report, facts = Report(args.out), machine.facts(args.threads)
    report.keep_processor(facts)
    cases = [
        Case(name, batch, dtype, args.threads)
        for name in args.models
        for dtype in args.dtypes or DTYPES
        for batch in args.batches or [TASKS[name].batch]
    ]
    with tempfile.TemporaryDirectory(prefix="fastdiff-training-") as scratch:
        settings = Settings(
            rounds=args.rounds, limit=args.limit, keep_heap=not args.plain_heap, warm=False,
            breakdown=args.breakdown, folder=args.logs or Path(scratch),
        )  # fmt: skip
        say(machine.line(facts))
        for case in report.remaining(cases, args.resume):
            peers = [name for name in PEERS if name in (args.peers or PEERS)]
            Run(case, peers, settings, report.put).run()
    print(report.text())
    tables.publish(args.out)


def _arguments() -> argparse.Namespace:
    options = parser("python -m benchmarks.training", __doc__, PEERS)
    options.add_argument(
        "--models", nargs="+", choices=TASKS, default=MEASURED,
        help=f"networks; default {' '.join(MEASURED)}",
    )  # fmt: skip
    options.add_argument(
        "--breakdown", choices=PEERS, default=OURS, metavar="PEER",
        help="the peer whose step is broken down; default %(default)s",
    )  # fmt: skip
    return options.parse_args()


if __name__ == "__main__":
    main()
