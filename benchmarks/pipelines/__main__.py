"""Time whole calls of a diffusers pipeline through fastdiff and through every peer, in turns.

    python -m benchmarks.pipelines                             both dtypes, one and four images
    python -m benchmarks.pipelines --dtypes float32            one of them
    python -m benchmarks.pipelines --models tiny --out /tmp/x  a quick test of the benchmark itself

A call is text embeddings to images: 20 steps with classifier-free guidance, then the decoder. Run
it from the repository's root, on a machine that does nothing else. Each peer runs in its own
process; its images are checked against eager float64 before it is timed. The row of a peer that
fails or takes too long says so. pipelines.json and pipelines.md are saved in --out after every new
figure, and hold figures of one processor. Progress goes to standard error, the tables to standard
output at the end.
"""

from __future__ import annotations

import argparse

from benchmarks.pipelines.peers import PEERS
from benchmarks.pipelines.pipes import PIPES
from benchmarks.pipelines.report import Report
from benchmarks.pipelines.worker import Run
from benchmarks.turns.job import DTYPES, Case
from benchmarks.turns.options import measure, parser

MEASURED, BATCHES = ("small",), (1, 4)


def main() -> None:
    args = _arguments()
    cases = [
        Case(name, batch, dtype, args.threads)
        for name in args.models
        for dtype in args.dtypes or DTYPES
        for batch in args.batches or BATCHES
    ]
    measure(args, Report(args.out), cases, PEERS, Run)


def _arguments() -> argparse.Namespace:
    options = parser("python -m benchmarks.pipelines", __doc__, PEERS)
    options.add_argument(
        "--models", nargs="+", choices=PIPES, default=MEASURED,
        help=f"pipelines; default {' '.join(MEASURED)}",
    )  # fmt: skip
    return options.parse_args()


if __name__ == "__main__":
    main()
