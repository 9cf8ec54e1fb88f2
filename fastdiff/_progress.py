"""Progress on standard error: a bar on a terminal or in a notebook, a line a minute elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import autonotebook, std
from tqdm.auto import tqdm

EVERY = 60.0  # seconds between two lines


class _Lines:
    """Writes a bar's states into a file one below the other, where tqdm overwrites the last one."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self.file.write(line + "\n")

    def flush(self) -> None:
        self.file.flush()


def bar(
    steps: Iterable[Any] | None = None, *, shown: bool = True, leave: bool = True, **options: Any
) -> tqdm:
    """A progress bar of tqdm, for work of ``total`` steps or over an iterable.

    Where standard error is no terminal, as in a log file or under CI, it is lines: the first and
    the last state (the latter only if it is to be kept), and at most one a minute between them.

    Args:
        steps: what to iterate over.
        shown: whether anything is shown at all.
        leave: keep the last state.
        options: others of ``tqdm.auto.tqdm``.
    """
    file = sys.stderr
    if file is None or not shown:
        return tqdm(steps, disable=True, **options)
    if file.isatty() or autonotebook.tqdm is not std.tqdm:
        return tqdm(steps, leave=leave, **options)
    return tqdm(
        steps, leave=leave, file=_Lines(file), ascii=True, mininterval=EVERY, maxinterval=EVERY,
        miniters=0, **options,
    )  # fmt: skip
