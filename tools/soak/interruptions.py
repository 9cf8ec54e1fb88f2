"""What interrupts a run of the soak, and what the run must do then.

Each function takes a started run and random numbers, ends the run's processes, and raises
:class:`FailedError` if they do not do what they must.
"""

from __future__ import annotations

import random
import signal
import subprocess

from tools.soak.command import WAIT, Command, Run, gone, send

TOO_SMALL = 2**14  # bytes: the files of tensors are larger, and soon the log of losses is
LOST_IN = 60.0  # seconds in which the other processes must notice that one is dead


class FailedError(Exception):
    """The run did not do what it must; the text says what it did."""


def kill(run: Run, command: Command, moment: float, chance: random.Random) -> None:
    """Kill -9 all processes: in one of five cases while they start, else while they train."""
    if chance.random() < 0.2:
        run.sleep(chance.uniform(0, 5))
    else:
        _let_train(run, moment)
    run.kill()


def kill_one(run: Run, command: Command, moment: float, chance: random.Random) -> None:
    """Kill -9 one process that trains; the others must end by themselves."""
    _let_train(run, moment)
    everyone = run.all()
    send([chance.choice(run.training() or everyone)], signal.SIGKILL)
    if run.ended(LOST_IN) is None or not gone(everyone, LOST_IN):
        send(everyone, signal.SIGKILL)
        raise FailedError(f"the other processes went on for {LOST_IN:.0f} s")


def terminate(run: Run, command: Command, moment: float, chance: random.Random) -> None:
    """SIGTERM: the run must end with a checkpoint and the signal's exit code."""
    _let_train(run, moment)
    if run.process.poll() is not None:
        return
    run.process.send_signal(signal.SIGTERM)
    code = run.ended()
    wanted = {0, 128 + signal.SIGTERM} if command.ranks == 1 else {0, 1, 128 + signal.SIGTERM}
    if code not in wanted:
        raise FailedError(f"exit code {code}: {run.notes()[-500:]}")
    if "stopped after step" not in run.notes() and "done:" not in run.notes():
        raise FailedError(f"no checkpoint is told of: {run.notes()[-500:]}")


def fill_disk(run: Run, command: Command, moment: float, chance: random.Random) -> None:
    """The disk is full for some time: the run must go on, and write the next checkpoint."""
    _let_train(run, 0)
    run.limit_files(TOO_SMALL)
    run.wait_until(lambda: "cannot write the checkpoint" in run.notes())
    if run.process.poll() is None:
        run.limit_files(-1)
        run.sleep(moment)
    if run.process.poll() not in (None, 0) and "error: cannot write" not in run.notes():
        raise FailedError(f"it ended: {run.notes()[-500:]}")
    run.kill()


def intrude(run: Run, command: Command, moment: float, chance: random.Random) -> None:
    """A second process on the folder must be refused, and the first not be disturbed."""
    _let_train(run, 0)
    with run.halted():  # so that it is not done before the second has started
        words = command.words(run.out)
        second = subprocess.run(words, capture_output=True, text=True, timeout=WAIT)
    refused = second.returncode != 0 and "is in use: process" in second.stderr
    if run.process.poll() is None and not refused:
        raise FailedError(f"a second process was not refused: {second.stderr[-500:]}")
    run.sleep(moment)
    run.kill()


def _let_train(run: Run, moment: float) -> None:
    """Wait until the run trains, and then some seconds; FailedError if it fails by itself."""
    if run.wait_until(run.trains):
        run.sleep(moment)
    if run.process.poll() not in (None, 0):
        raise FailedError(f"exit code {run.process.poll()}: {run.notes()[-500:]}")
