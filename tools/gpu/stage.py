"""A stage of the report: a command with a time limit, whose failure ends nothing but itself."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.build.common import ROOT

GRACE = 5.0  # seconds between the request to end and the end


@dataclass(frozen=True)
class Stage:
    """What to run.

    Attributes:
        name: a word, of which the log is named.
        title: what it shows, for the report.
        command: program and arguments, run in the repository's root.
        limit: seconds that it may take.
        needs: names of ``machine.Machine`` without which it is left out.
        shown: the lines of its output that the report shows.
        environment: variables beside those of this process.
    """

    name: str
    title: str
    command: Sequence[str]
    limit: float
    needs: Sequence[str] = ()
    shown: Callable[[list[str]], list[str]] = lambda lines: lines[-30:]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a stage went: ``status`` is passed, failed, out of time or left out."""

    name: str
    title: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    lines: list[str] = field(default_factory=list)
    command: str = ""


def run(stage: Stage, folder: Path, missing: dict[str, str], remaining: float) -> Outcome:
    """Run a stage, unless something is missing or no time remains.

    Its whole output is in ``<name>.log`` in the folder, also where it is stopped.
    """
    outcome = Outcome(stage.name, stage.title, "left out", command=" ".join(stage.command))
    lacking = [f"no {name}: {missing[name]}" for name in stage.needs if name in missing]
    limit = min(stage.limit, remaining - GRACE)
    if lacking or limit <= 0:
        outcome.reason = "; ".join(lacking) or "no time was left"
        return outcome
    began = time.monotonic()
    log = folder / f"{stage.name}.log"
    try:
        with log.open("w", encoding="utf-8") as output:
            code = _code(stage, output, limit)
    except OSError as error:  # the program is not there, or not one
        code, log_lines = 127, [str(error)]
    else:
        log_lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.lines = stage.shown(log_lines)
    if code is None:
        outcome.status, outcome.reason = "out of time", f"stopped after {limit:.0f} s"
    elif code:
        outcome.status, outcome.reason = "failed", f"exit status {code}"
        outcome.lines = outcome.lines or log_lines[-30:]
    else:
        outcome.status = "passed"
    return outcome


def _code(stage: Stage, output: object, limit: float) -> int | None:
    """The exit status, or None where the stage was stopped, with all that it had started."""
    process = subprocess.Popen(
        stage.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}, start_new_session=True,
    )  # type: ignore[call-overload]  # fmt: skip
    try:
        return int(process.wait(limit))
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Ctrl-C first, at which pytest says what it had: children that outlive it go in any case.
        for number, grace in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
            try:
                os.killpg(process.pid, number)
                process.wait(grace)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
