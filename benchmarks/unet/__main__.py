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
import os
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks import machine, tables
from benchmarks.unet.job import Case
from benchmarks.unet.models import DTYPES, NETWORKS
from benchmarks.unet.peers import OURS, PEERS
from benchmarks.unet.report import Report
from benchmarks.unet.suites import SUITES
from benchmarks.unet.turns import Run, Settings, say

BUSY = 0.5  # load average above which other work is likely to disturb the figures
SAMPLING_STEPS = 50


def main() -> None:
    args = _arguments()
    # SIGTERM raises SystemExit, so that the workers are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load = os.getloadavg()[0]
    if load > BUSY:
        say(f"this machine is busy: a load of {load:.2f}, at most {BUSY} is wanted for figures")
    suite = SUITES[args.suite] if args.suite else None
    report = Report(args.out, args.suite, suite.text) if suite else Report(args.out)
    cases = _cases(args)
    facts = machine.facts(args.threads)
    if suite:
        left_out = report.keep(lambda record: machine.same(record["machine"], facts))
        if left_out:
            say(f"{report.json}: {left_out} records of another processor will be left out")
        if suite.draw:
            suite.draw([], args.out)
    with tempfile.TemporaryDirectory(prefix="fastdiff-unet-") as scratch:
        settings = Settings(
            args.rounds, args.limit, not args.plain_heap, bool(suite and suite.warm), args.sampling,
            args.breakdown, args.logs or Path(scratch),
        )  # fmt: skip
        say(machine.line(facts))
        for number, case in enumerate(cases, 1):
            if args.resume and report.has(case):
                say(f"{case.title}: already in {report.json}")
                continue
            say(f"{case.title}: case {number} of {len(cases)}")
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
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.unet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="peers:\n  " + "\n  ".join(PEERS),
    )
    options.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), metavar="FOLDER",
        help="for unet.json and unet.md, or those of the suite; default %(default)s",
    )  # fmt: skip
    options.add_argument(
        "--suite", choices=SUITES,
        help="bfloat16: calls, memory and first calls of three networks, with fastdiff, OpenVINO, "
        "Inductor and eager; scaling: the CIFAR-10 U-Net from 1 to 32 images, 16 to 128 pixels and "
        "1 to all threads, with a picture",
    )  # fmt: skip
    options.add_argument(
        "--resume", action="store_true",
        help="leave out the cases that the file of figures has already",
    )  # fmt: skip
    options.add_argument(
        "--models", nargs="+", choices=NETWORKS,
        help="networks; sd15 is run by one process at a time and needs 16 GiB; default cifar10",
    )  # fmt: skip
    options.add_argument(
        "--peers", nargs="+", choices=PEERS, metavar="PEER",
        help="peers from the list below; default all peers of the network",
    )  # fmt: skip
    options.add_argument(
        "--batches", nargs="+", type=_positive, metavar="N", help="default the network's own"
    )
    options.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=" or ".join(DTYPES)
    )
    options.add_argument(
        "--threads", type=_positive, default=machine.cores(), metavar="N",
        help="of every peer; default all cores, %(default)s here",
    )  # fmt: skip
    options.add_argument(
        "--rounds", type=_positive, default=9, metavar="N",
        help="turns of each peer; slow peers and large networks take fewer; default %(default)s",
    )  # fmt: skip
    options.add_argument(
        "--sampling", nargs="?", type=_positive, const=SAMPLING_STEPS, metavar="STEPS",
        help="also time sampling loops of the U-Nets, DDIM, 50 steps unless given",
    )  # fmt: skip
    options.add_argument(
        "--breakdown", nargs="?", choices=PEERS, const=OURS, metavar="PEER",
        help="also say where the time goes, of fastdiff or another PyTorch peer",
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
    return options.parse_args()


def _new_folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and any(path.iterdir()):
        raise argparse.ArgumentTypeError(f"wanted a folder that is new or empty, got {text}")
    return path.absolute()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {value}")
    return value


if __name__ == "__main__":
    main()
