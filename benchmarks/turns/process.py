"""A worker's process: start it, send it requests, end it; errors say why there is no answer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from benchmarks import machine
from benchmarks.turns.job import Job

Program = Callable[[Connection, Job, str], None]


class WorkerError(Exception):
    """A worker gave no answer; the text says why."""


class Process:
    """A process for one job, with compiler caches of its own.

    Args:
        program: answers requests on the connection; its output goes into the file of that name.
        job: the worker's task.
        limit: longest time for a request, in seconds.
    """

    def __init__(self, program: Program, job: Job, limit: float) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        self.job, self.limit = job, limit
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # The caches are empty, so that the first call takes as long as a user's first call.
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(job.folder / "inductor"),
            "XDG_CACHE_HOME": str(job.folder / "cache"),
            "FASTDIFF_CACHE": str(job.folder / "cache"),  # which a user may have set
            "OMP_NUM_THREADS": str(job.case.threads),
            "MKL_NUM_THREADS": str(job.case.threads),
        }
        self._process = context.Process(
            target=program, args=(theirs, job, str(job.folder) + ".log")
        )
        with _environment(caches):
            self._process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """Call a method of the worker, and return its result.

        Args:
            request: the method's name and arguments.

        Raises:
            WorkerError: the method raised, the process died, or it took longer than the limit.
        """
        try:
            self._connection.send(request)
            if not self._connection.poll(self.limit):
                self.close()
                raise WorkerError(f"gave up after {self.limit:.0f} s")
            status, value = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self._process.join(10)
            raise WorkerError(f"its process ended: {_ending(self._process.exitcode)}") from error
        if status == "failed":
            raise WorkerError(value)
        return value

    def cpu_seconds(self) -> float:
        """Processor time of all threads of the process, in seconds."""
        return machine.cpu_seconds(self._process.pid) if self._process.pid else 0.0

    def close(self) -> None:
        """End the process and all processes that it has started."""
        self._connection.close()
        self._process.join(5)
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def idle_share(others: list[Process], before: list[float], start: float) -> float:
    """Number of cores that processes, which should have been idle, used since ``start``.

    ``before`` holds the processor time of each of them at ``start``.
    """
    taken = sum(p.cpu_seconds() - b for p, b in zip(others, before, strict=True))
    return taken / max(time.perf_counter() - start, 1e-9)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, perhaps for want of memory" if name == "SIGKILL" else name
    return f"exit status {code}"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Any:
    saved = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
