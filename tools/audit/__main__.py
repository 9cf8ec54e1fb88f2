"""The command: ``python -m tools.audit``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.audit import cuda_kernels, report, traffic, triton_kernels
from tools.audit.cases import COMPILED, OPERATIONS, THOROUGH, cases
from tools.audit.measured import Measured, problems
from tools.audit.occupancy import ARCHITECTURES
from tools.audit.sass import NotCheckedError

_DESCRIPTION = """\
Check the GPU kernels without a GPU. Every kernel that the operations launch at the shapes of
production is compiled for each architecture, the Triton ones as Triton would at run time, and its
machine code read: registers, shared memory, spills, the width of accesses, and the occupancy that
follows. Then the kernels are run on small tensors, by Triton's interpreter and the emulation
of CUDA, and the bytes that they read and write are counted, in S, the size of one activation.
"""
_EPILOG = """\
columns: of a kernel's configurations each number is the worst. registers and occupancy are of each
architecture; shared is in bytes of a block (in CUDA without what a launch adds), spilled in bytes
of a thread; load and store are in bits, the narrowest access to an activation in Triton, the widest
of the instance for aligned tensors in CUDA. Of bytes, the case is shown that moves most over the
least.

exit status: 0 if all is well; 1 if a kernel spills, moves an activation in less than 128 bits or
moves more than 1.05 times the least bytes; 2 if something that was asked for could not be checked.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the audit and return the exit status."""
    options = _options(argv)
    found: list[Measured] = []
    moved: list[traffic.Traffic] = []
    skipped = []
    for part, what, wanted in (
        (_triton, "Triton kernels", not options.no_triton),
        (_cuda, "CUDA kernels", not options.no_cuda),
        (_triton_bytes, "bytes in Triton", not options.no_triton and not options.no_bytes),
        (_cuda_bytes, "bytes in CUDA", not options.no_cuda and not options.no_bytes),
    ):
        if not wanted:
            continue
        try:
            for one in part(options):
                if isinstance(one, Measured):
                    found.append(one)
                else:
                    moved.append(one)
        except NotCheckedError as reason:
            skipped.append(f"{what}: not checked, {reason}")
    wrong = [*problems(found), *filter(None, (one.problem for one in moved))]
    if options.json:
        print(report.as_json(found, moved, wrong))
    elif found or moved:
        print(report.tables(found, moved, options.all, options.markdown))
    if options.figures:
        _keep(options.figures, *report.rows(found, moved))
    for line in (*wrong, *skipped):
        print(line, file=sys.stderr)
    return 1 if wrong else 2 if skipped else 0


def _keep(folder: Path, kernels: Sequence[Any], moved: Sequence[Any]) -> None:
    """Put both tables into gpu_audit.json, and render those of the documentation."""
    from benchmarks import machine, tables  # which only a checkout has

    taken = machine.facts(threads=1)
    with suppress(PackageNotFoundError):
        taken["versions"] |= {"triton": version("triton")}
    results = {"machines": [taken], "kernels": kernels, "bytes": moved}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (folder / "gpu_audit.json").write_text(text + "\n", encoding="utf-8")
    tables.publish(folder)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.audit",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ops", type=_list(str, OPERATIONS), help="operations, with commas between (default: all)"
    )
    parser.add_argument(
        "--archs",
        type=_list(int, ARCHITECTURES),
        default=list(ARCHITECTURES),
        help="architectures, with commas between (default: 80,90,100)",
    )
    parser.add_argument("--no-triton", action="store_true", help="leave the Triton kernels out")
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA kernels out")
    parser.add_argument("--no-bytes", action="store_true", help="compile only, count no bytes")
    parser.add_argument(
        "--thorough", action="store_true", help="compile at every shape, not at a choice of them"
    )
    parser.add_argument(
        "--all", action="store_true", help="show every configuration and case, not the worst"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="FOLDER",
        help="keep the tables there; in benchmarks/results the documentation shows them",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    form.add_argument("--json", action="store_true", help="print every configuration as JSON")
    return parser.parse_args(argv)


def _list(kind: Callable[[str], Any], known: Any) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        values: list[Any] = []
        for part in text.split(","):
            with suppress(ValueError):
                values.append(kind(part.strip().removeprefix("sm_")))
            if not values or values[-1] not in known:
                raise argparse.ArgumentTypeError(
                    f"{part!r} is none of {', '.join(map(str, known))}"
                )
        return values

    return parse


def _triton(options: argparse.Namespace) -> Iterator[Measured]:
    triton_kernels.refuse_the_interpreter()
    shapes = THOROUGH if options.thorough else COMPILED
    found = triton_kernels.compilations(cases(shapes, options.ops), options.archs)
    names = list(found.values())
    for index, one in enumerate(
        tqdm(
            triton_kernels.compile_all(list(found), options.jobs),
            "Triton kernels",
            len(found),
            leave=False,
            disable=None,
        )
    ):
        yield replace(one, configuration=names[index][0], cases=len(names[index]))


def _cuda(options: argparse.Namespace) -> Iterator[Measured]:
    todo = cuda_kernels.units(options.ops, options.archs)
    measured = cuda_kernels.measure_all(todo, options.jobs)
    for unit in tqdm(measured, "CUDA sources", len(todo), leave=False, disable=None):
        yield from unit


def _triton_bytes(options: argparse.Namespace) -> Iterator[traffic.Traffic]:
    counted = traffic.triton_traffic(options.ops, options.jobs)
    yield from tqdm(counted, "bytes in Triton", leave=False, disable=None)


def _cuda_bytes(options: argparse.Namespace) -> Iterator[traffic.Traffic]:
    counted = traffic.cuda_traffic(options.ops)
    yield from tqdm(counted, "bytes in CUDA", leave=False, disable=None)


if __name__ == "__main__":
    sys.exit(main())
