"""The report: what the machine is, how each stage went and what it showed."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from tools.build.common import ROOT
from tools.gpu.machine import Machine
from tools.gpu.stage import Outcome


def write(folder: Path, here: Machine, outcomes: list[Outcome]) -> None:
    """Write report.md and report.json into the folder. Called after each stage."""
    facts = {
        "commit": commit(),
        "machine": asdict(here),
        "stages": [asdict(outcome) for outcome in outcomes],
    }
    (folder / "report.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(here, outcomes), encoding="utf-8")


def markdown(here: Machine, outcomes: list[Outcome]) -> str:
    """The report as a page."""
    parts = ["# fastdiff on a GPU", "", f"Commit {commit()}.", ""]
    parts += [f"- {name}: {value}" for name, value in here.found.items()]
    parts += [f"- no {name}: {reason}" for name, reason in here.missing.items()]
    parts += ["", "| stage | result | seconds | |", "| --- | --- | ---: | --- |"]
    parts += [f"| {o.title} | {o.status} | {o.seconds} | {o.reason} |" for o in outcomes]
    for outcome in outcomes:
        if outcome.lines:
            parts += ["", f"## {outcome.title}", "", f"`{outcome.command}`", ""]
            parts += ["```", *outcome.lines, "```"]
    return "\n".join(parts) + "\n"


def commit() -> str:
    """The commit that is checked out, or unknown where the sources are no repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
