"""Progress on standard error: a bar on a terminal and in a notebook, a line a minute elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TextIO

from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm

INTERVAL = 60.0  # seconds between two lines in a file or a pipe


def progress_bar(
    iterable: Iterable[Any] | None = None, *, shown: bool = True, leave: bool = True, **options: Any
) -> tqdm:
    """A tqdm bar on standard error.

    If standard error is no terminal, the bar writes whole lines: the first at once, then at most
    one per minute, and one at the end. A line that cannot be written is dropped.

    Args:
        iterable: the items to count; None if the caller calls ``update``.
        shown: False for a bar that writes nothing.
        leave: keep the finished bar on the terminal.
        options: other options of tqdm.
    """
    stream = sys.stderr
    if not shown or stream is None:
        return tqdm(iterable, disable=True, **options)
    if _redraws(stream) or tqdm is not tqdm_asyncio:  # tqdm.auto's class differs in notebooks
        return tqdm(iterable, leave=leave, **options)
    return tqdm(
        iterable, file=_Lines(stream), mininterval=INTERVAL, maxinterval=INTERVAL, miniters=1,
        **options,
    )  # fmt: skip


def _redraws(stream: TextIO) -> bool:
    """Whether a line can be overwritten, that is, whether the stream is a terminal."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # no file, or a closed one
        return False


class _Lines:
    """A stream for tqdm that writes every state of the bar as a line, and never fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None)

    def write(self, text: str) -> None:
        """Write a state of the bar, which begins with a carriage return; drop cursor moves."""
        line = text.strip() if text.startswith("\r") else ""
        if line:
            self._do(lambda: self._stream.write(line + "\n"))

    def flush(self) -> None:
        """Flush the stream."""
        self._do(self._stream.flush)

    def _do(self, call: Callable[[], object]) -> None:
        with suppress(OSError, ValueError):  # a full disk, a pipe without a reader, a closed file
            call()
