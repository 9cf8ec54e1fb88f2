"""The run of training steps: in turns, see ``turns.run``."""

from __future__ import annotations

from benchmarks.training.worker import Worker, main
from benchmarks.turns import run


class Run(run.Run):
    """One case, all peers; see ``turns.run.Run``."""

    program = main
    slow = Worker.slow
    breakdown_calls = 5
