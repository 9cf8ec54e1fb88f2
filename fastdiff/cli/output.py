"""What the command line writes on standard output and standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any


@contextmanager
def standard_output(own: bool) -> Iterator[None]:
    """For a ``with`` block, let print take any character; flush standard output at its end.

    Characters that the output's encoding lacks are written as backslash escapes.

    Args:
        own: whether the process uses standard output for nothing else. If so, after an error what
            could not be written is dropped.

    Raises:
        OSError: not everything could be written: a full disk, or a pipe that nobody reads.
    """
    stream = sys.stdout
    strict = stream if isinstance(stream, TextIOWrapper) and stream.errors == "strict" else None
    try:
        if strict is not None:
            strict.reconfigure(errors="backslashreplace")
        yield
    finally:
        try:
            if strict is not None:
                strict.reconfigure(errors="strict")
            if stream is not None:
                stream.flush()
        except OSError:
            if own:  # otherwise Python would fail again when it flushes at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise


def note(text: str) -> None:
    """Print a line for the user on standard error; if its terminal is closed, drop the line."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr)


def print_json(value: Mapping[str, Any]) -> None:
    """Print the command's one JSON object on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))
