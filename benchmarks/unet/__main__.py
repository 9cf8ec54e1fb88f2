"""Time a U-Net's call through fastdiff's compiler backend and through every peer, in turns.

    python -m benchmarks.unet                             every peer, the CIFAR-10 U-Net
    python -m benchmarks.unet --sampling --breakdown      with 50 steps of DDIM, and where time goes
    python -m benchmarks.unet --models sd15 vae           other networks
    python -m benchmarks.unet --models tiny --out /tmp/x  a quick test of the benchmark itself
    python -m benchmarks.unet --suite bfloat16            both dtypes, small and large networks
    python -m benchmarks.unet --suite scaling --resume    time against batch, size and threads

Run it from the repository's root, on a machine that does nothing else. Each peer runs in its own
process; its output is checked against eager float64 before it is timed. The row of a peer that is
missing, fails or takes too long says so. unet.json and unet.md are saved in --out after every new
figure; figures of earlier runs for other networks, batch sizes and dtypes stay in them. A suite is
a fixed set of cases and peers with files of its own name, which hold figures of one processor;
--models, --batches, --dtypes and --peers leave out the rest of it. Progress goes to standard error,
the tables to standard output at the end.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import machine, tables
from benchmarks.turns.job import DTYPES, OURS, Case
from benchmarks.turns.options import begin, parser, positive
from benchmarks.turns.run import say
from benchmarks.unet.models import NETWORKS
from benchmarks.unet.peers import PEERS
from benchmarks.unet.report import Report
from benchmarks.unet.run import Run, Settings
from benchmarks.unet.suites import SUITES

SAMPLING_STEPS = 50


def main() -> None:
    args = _arguments()
    begin()
    suite = SUITES[args.suite] if args.suite else None
    report = Report(args.out, args.suite, suite.text) if suite else Report(args.out)
    cases = _cases(args)
    facts = machine.facts(args.threads)
    if suite:
        report.keep_processor(facts)
        if suite.draw:
            suite.draw([], args.out)
    with tempfile.TemporaryDirectory(prefix="fastdiff-unet-") as scratch:
        settings = Settings(
            args.rounds, args.limit, not args.plain_heap, bool(suite and suite.warm),
            args.breakdown, args.logs or Path(scratch), args.sampling,
        )  # fmt: skip
        say(machine.line(facts))
        for case in report.remaining(cases, args.resume):
            peers = args.peers or (suite.peers if suite else NETWORKS[case.network].peers) or PEERS
            Run(case, [name for name in PEERS if name in peers], settings, report.put).run()
    print(report.text())
    if suite and suite.draw:
        suite.draw(report.records, args.out)
    tables.publish(args.out)


def _cases(args: argparse.Namespace) -> list[Case]:
    """The cases of the command line: those asked for of a suite, or every combination."""
    if not args.suite:
        return [
            Case(name, batch, dtype, args.threads)
            for name in args.models or ["cifar10"]
            for dtype in args.dtypes or NETWORKS[name].dtypes
            for batch in args.batches or NETWORKS[name].batches
        ]
    every = SUITES[args.suite].cases(args.threads)
    cases = [
        case
        for case in every
        if case.network in (args.models or NETWORKS)
        and case.dtype in (args.dtypes or DTYPES)
        and case.batch in (args.batches or [case.batch])
    ]
    if not cases:
        known = "\n".join(case.title for case in every)
        raise SystemExit(f"the suite {args.suite} has none of these cases, it has\n{known}")
    return cases


def _arguments() -> argparse.Namespace:
    options = parser("python -m benchmarks.unet", __doc__, PEERS)
    options.add_argument(
        "--suite", choices=SUITES,
        help="bfloat16: calls, memory and first calls of three networks, with fastdiff, OpenVINO, "
        "Inductor and eager; scaling: the CIFAR-10 U-Net from 1 to 32 images, 16 to 128 pixels and "
        "1 to all threads, with a picture",
    )  # fmt: skip
    options.add_argument(
        "--models", nargs="+", choices=NETWORKS,
        help="networks; sd15 is run by one process at a time and needs 16 GiB; default cifar10",
    )  # fmt: skip
    options.add_argument(
        "--sampling", nargs="?", type=positive, const=SAMPLING_STEPS, metavar="STEPS",
        help="also time sampling loops of the U-Nets, DDIM, 50 steps unless given",
    )  # fmt: skip
    options.add_argument(
        "--breakdown", nargs="?", choices=PEERS, const=OURS, metavar="PEER",
        help="also say where the time goes, of fastdiff or another PyTorch peer",
    )  # fmt: skip
    return options.parse_args()


if __name__ == "__main__":
    main()
