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

from benchmarks.training.peers import PEERS
from benchmarks.training.report import Report
from benchmarks.training.run import Run
from benchmarks.training.tasks import TASKS
from benchmarks.turns.job import DTYPES, OURS, Case
from benchmarks.turns.options import measure, parser

MEASURED = ("cifar10", "digits")


def main() -> None:
    args = _arguments()
    cases = [
        Case(name, batch, dtype, args.threads)
        for name in args.models
        for dtype in args.dtypes or DTYPES
        for batch in args.batches or [TASKS[name].batch]
    ]
    measure(args, Report(args.out), cases, PEERS, Run, args.breakdown)


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
