"""The command: ``python -m tools.gpu``, in ``make gpu``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.build.common import BUILD, ROOT
from tools.gpu import report
from tools.gpu.machine import Machine
from tools.gpu.stage import Outcome, Stage, run
from tools.gpu.stages import stages

_DESCRIPTION = """\
Build the CUDA part for this machine's device, test and time every GPU kernel, and write one report,
report.md and report.json. Runs with the packages of the Python that runs it and installs none. What
fails or is missing is told in the report; the other stages run all the same.

exit status: 0 if all stages passed; 1 if one failed or was stopped; 2 if one was left out.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=BUILD / "gpu", help="folder of the report")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages together")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages alone")
    options = parser.parse_args(argv)
    here = look()
    chosen = stages(here)
    unknown = set(options.only or ()) - {stage.name for stage in chosen}
    if unknown:
        names = ", ".join(stage.name for stage in chosen)
        parser.error(f"no stage {', '.join(sorted(unknown))}: there are {names}")
    if options.only:
        chosen = [stage for stage in chosen if stage.name in options.only]
    outcomes = run_all(chosen, here, options.out.resolve(), 60 * options.minutes)
    print(f"report: {options.out / 'report.md'}")
    states = {outcome.status for outcome in outcomes}
    return 1 if states & {"failed", "out of time"} else 2 if "left out" in states else 0


def look(limit: float = 60) -> Machine:
    """What the machine has, asked in a process that may fail or hang."""
    command = [sys.executable, "-m", "tools.gpu.machine"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        return Machine(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        reason = f"looking for a device took more than {limit:.0f} s"
    except (ValueError, IndexError):
        reason = f"looking for a device failed: {done.stderr.strip()[-300:]}"
    return Machine(missing={"device": reason})


def run_all(chosen: Sequence[Stage], here: Machine, folder: Path, seconds: float) -> list[Outcome]:
    """Run the stages, one after the other within that time, and write the report after each."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    report.write(folder, here, outcomes)
    for stage in chosen:
        print(f"{stage.name}: {stage.title}", flush=True)
        outcome = run(stage, folder, here.missing, end - time.monotonic())
        print(f"  {outcome.status}, {outcome.seconds:.0f} s  {outcome.reason}", flush=True)
        outcomes.append(outcome)
        report.write(folder, here, outcomes)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
