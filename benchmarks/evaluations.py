"""The figures of ``fastdiff eval``, kept by the command that gives them."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks import machine
from fastdiff import cli

SHOWN = ("frechet", "accuracy", "precision", "recall")  # in a line, of those that there are


def command(words: Sequence[str]) -> str:
    """Run a ``fastdiff`` command and return what it prints; exit if it fails."""
    with redirect_stdout(io.StringIO()) as out:
        code = cli.main(words)
    if code:
        sys.exit(code)
    return out.getvalue()


def evaluation(words: Sequence[str]) -> dict[str, Any]:
    """What ``fastdiff eval`` says with these arguments.

    The checkpoint's path is left out: the arguments name it, and where a model that comes along
    lies differs from machine to machine.
    """
    facts: dict[str, Any] = json.loads(command(["eval", *words, "--json"]))
    del facts["checkpoint"]
    return facts


class Figures:
    """The results of ``fastdiff eval`` by its command, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = {"machines": [], "rows": [], "found": {}}
        if path.exists():
            self.results = json.loads(path.read_text(encoding="utf-8"))

    def of(self, words: str) -> str:
        """Run ``fastdiff eval`` with these arguments, unless its figures are in the file.

        Returns:
            The command, the key of the figures in ``results["found"]``.
        """
        asked = " ".join(f"fastdiff eval {words}".split())
        known = self.results["found"]
        if asked not in known:
            facts = known[asked] = evaluation(words.split())
            machines = machine.with_this_one(self.results["machines"], facts["threads"])
            self.results["machines"] = machines
            self.save()
        shown = (f"{name} {known[asked][name]:.3f}" for name in SHOWN if name in known[asked])
        print(", ".join(shown), asked, sep="  ", flush=True)
        return asked

    def save(self) -> None:
        """Write the file; if that is interrupted, the earlier file stays."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        os.replace(partial, self.path)
