"""Processes that read and decode images, so that the process that trains need not wait.

Processes and not threads: decoding small files is mostly Python code, which would take turns with
that of the training loop. Each process belongs to a thread of the training process, which sends it
numbers of images and waits for the pixels; a future stands for each such request.

A forked process begins at once, and shares the list of images without a copy. It lets go of all
files and sockets that it inherited. So it holds no lock of its parent and keeps none of its
connections open; and since only the parent then has the other end of its pipe, it ends when the
parent is gone.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from fastdiff.common.errors import DataError
from fastdiff.data.image_file import Depth, Reading
from fastdiff.data.image_source import ImageSource

ATTEMPTS = 3  # a request that this many processes in a row did not survive is an error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unread:
    """Stands for an image that cannot be read; the text says which and why."""

    text: str


Image = tuple[np.ndarray, Depth | None] | Unread


def read_images(source: ImageSource, reading: Reading, indices: Sequence[int]) -> list[Image]:
    """Images of a source, ``[H, W, C]`` each, or what says why one cannot be read."""
    images: list[Image] = []
    for index in indices:
        try:
            images.append(source.read(index, reading))
        except DataError as error:
            images.append(Unread(str(error)))
    return images


class ReadingWorkers:
    """Reads images of a source in processes of its own.

    Args:
        source: of the images.
        reading: how they become pixels.
        count: number of processes, which begin at the first request; without any, an image is
            read when it is requested.
    """

    def __init__(self, source: ImageSource, reading: Reading, count: int) -> None:
        self._what = (source, reading)
        self.count = count
        self._threads: ThreadPoolExecutor | None = None
        self._idle: list[_Process] = []

    def read(self, indices: Sequence[int]) -> Future[list[Image]]:
        """The images of ``indices``, see :func:`read_images`.

        The future raises DataError if the processes that read them die again and again.
        """
        if not self.count:
            done: Future[list[Image]] = Future()
            done.set_result(read_images(*self._what, indices))
            return done
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.count, "fastdiff reading")
            self._idle = [_Process(*self._what) for _ in range(self.count)]
            weakref.finalize(self, _close, self._threads, self._idle)
        return self._threads.submit(_request, self._idle, self._what, list(indices))


class _Process:
    """A process that reads images, and the pipe to it."""

    def __init__(self, source: ImageSource, reading: Reading) -> None:
        # Linux alone: on other systems libraries may not survive a fork.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self.pipe, theirs = context.Pipe()
        self.process: Any = context.Process(
            target=_serve, args=(theirs, source, reading), name="fastdiff reading", daemon=True
        )
        try:
            self.process.start()
        except OSError as error:
            raise DataError(
                f"cannot start a process that reads images: {error.strerror or error}; workers=0 "
                "(--workers 0) reads without any"
            ) from None
        theirs.close()

    def ask(self, indices: list[int]) -> list[Image]:
        """The images of ``indices``; EOFError or OSError if the process is no more."""
        self.pipe.send(indices)
        images: list[Image] = self.pipe.recv()
        return images

    def ending(self) -> str:
        """How the process ended that no longer answers."""
        self.pipe.close()
        self.process.join()
        code = int(self.process.exitcode)
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _request(
    idle: list[_Process], what: tuple[ImageSource, Reading], indices: list[int]
) -> list[Image]:
    """Ask an idle process; if it dies, another in its place."""
    ending = ""
    for _ in range(ATTEMPTS):
        try:
            process = idle.pop()
        except IndexError:  # one has died
            process = _Process(*what)
        try:
            images = process.ask(indices)
        except (EOFError, OSError):
            ending = process.ending()
            log.warning("a process that reads images %s; another takes its place", ending)
            continue
        idle.append(process)
        return images
    raise DataError(
        f"{ATTEMPTS} processes in a row died while they read {len(indices)} images from "
        f"{what[0].place(indices[0])} on, the last {ending}: memory has run out, or a file is "
        "damaged in a way that its decoder does not survive"
    )


def _close(threads: ThreadPoolExecutor, idle: list[_Process]) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for process in idle:
        with suppress(OSError):
            process.pipe.close()


def _serve(pipe: Connection, source: ImageSource, reading: Reading) -> None:
    """Answer requests until the parent closes its end of the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        _let_go(pipe.fileno())
    with suppress(EOFError, OSError):
        while True:
            pipe.send(read_images(source, reading, pipe.recv()))


def _let_go(kept: int) -> None:
    """Let go of every file and socket of the parent but its standard streams and one pipe.

    Their numbers then belong to the null device: were they closed, an inherited object that closes
    its own later would close a file that has been opened since and got the number.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in (kept, null):
            with suppress(OSError):
                os.dup2(null, number, inheritable=False)
