"""Interrupt a training run again and again; see the package."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tools.soak import interruptions
from tools.soak.command import Command, Run, write_images
from tools.soak.interruptions import FailedError
from tools.soak.judging import check_end, check_progress

SHARES = 6  # of a run's time: a moment of interruption lies within the first share

Interruption = Callable[[Run, Command, float, random.Random], None]


class Soak:
    """The interruptions and what has become of them.

    Args:
        command: of the run.
        folder: where the runs are made.
        seed: of what happens when.
    """

    def __init__(self, command: Command, folder: Path, seed: int) -> None:
        self.command, self.folder = command, folder
        self.chance = random.Random(seed)
        self.passed = self.failed = self.kills = 0
        self.whole = folder / "whole"
        self._span = 1.0

    def train_whole(self) -> None:
        """Train without interruption, and measure how long that takes."""
        began = time.monotonic()
        run = Run(self.command, self.whole)
        run.wait_until(run.trains)
        first = time.monotonic()
        code = run.ended(600)
        if code != 0:
            raise FailedError(
                f"the run without interruption ended with {code}: {run.notes()[-2000:]}"
            )
        seconds = time.monotonic() - first
        self._span = seconds / SHARES
        print(
            f"without interruption: {self.command.steps} steps in {seconds:.1f} s, "
            f"begun after {first - began:.1f} s",
            flush=True,
        )

    def go_on(self, wanted: int, until: float) -> None:
        """Interrupt runs until there were as many kills as wanted, or the time is over."""
        number = 0
        while self.kills < wanted and time.monotonic() < until:
            number += 1
            self._run_with_interruptions(self.folder / f"run{number}", wanted, until)

    def _run_with_interruptions(self, out: Path, wanted: int, until: float) -> None:
        """One run from its beginning to its end."""
        step, filled = 0, False
        while self.kills < wanted and time.monotonic() < until and step < self.command.steps:
            interruption = self._choose()
            filled |= interruption is interruptions.fill_disk
            run = Run(self.command, out)
            moment = self.chance.uniform(0, self._span)
            try:
                interruption(run, self.command, moment, self.chance)
                before, step = step, check_progress(out, self.whole, step)
                self._tell(interruption.__name__, f"checkpoint of step {before} -> {step}")
            except FailedError as failure:
                self._tell(interruption.__name__, f"in {out}: {failure}", good=False)
                return
            finally:
                if run.process.poll() is None:
                    run.kill()
            self.kills += interruption.__name__.startswith("kill")
        self._finish(out, all_kept=not filled)

    def _finish(self, out: Path, *, all_kept: bool) -> None:
        """Let a run go on to its end, and compare it with the one without interruption."""
        try:
            run = Run(self.command, out)
            code = run.ended(600)
            if code != 0:
                raise FailedError(f"exit code {code}: {run.notes()[-2000:]}")
            check_end(out, self.whole, all_kept=all_kept)
        except FailedError as failure:
            self._tell("end", f"in {out}: {failure}", good=False)
            return
        self._tell("end", "bit for bit the run without interruption")
        shutil.rmtree(out)

    def _choose(self) -> Interruption:
        kinds: dict[Interruption, int] = {
            interruptions.kill: 8,
            interruptions.kill_one: 6,
            interruptions.terminate: 2,
            interruptions.fill_disk: 1,
            interruptions.intrude: 1,
        }
        return self.chance.choices(list(kinds), list(kinds.values()))[0]

    def _tell(self, name: str, text: str, *, good: bool = True) -> None:
        self.passed += good
        self.failed += not good
        print(f"{'passed' if good else 'FAILED'}  {name:10} {text}", flush=True)


def main(words: list[str] | None = None) -> int:
    """Soak, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="tools.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="after which no run is begun")
    parser.add_argument("--kills", type=int, default=50, help="how often to kill -9")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train")
    parser.add_argument("--workers", type=int, default=1, help="that read images for each of them")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    parser.add_argument("--out", type=Path, help="folder to work in, which must not exist")
    parser.add_argument("extra", nargs="*", help="options of fastdiff train, after --")
    args = parser.parse_args(words)
    until = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = Path(temporary) if args.out is None else args.out
        images = folder / "images"
        write_images(images)
        command = Command(images, args.steps, args.ranks, args.workers, tuple(args.extra))
        soak = Soak(command, folder, args.seed)
        soak.train_whole()
        soak.go_on(args.kills, until)
    print(f"{soak.passed} passed, {soak.failed} failed; kill -9: {soak.kills} times")
    enough = soak.kills >= args.kills
    if not enough:
        print(f"the time was over before the {args.kills} kills that were wanted", file=sys.stderr)
    return int(bool(soak.failed) or not enough)


if __name__ == "__main__":
    sys.exit(main())
