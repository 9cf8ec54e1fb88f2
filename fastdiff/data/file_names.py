"""File names as text that is the same in every locale.

Python decodes a file name by the locale: "café" is "caf\\udcc3\\udca9" if LANG is C and UTF-8 mode
is off. Checkpoints record a name, which another machine may compare, as its bytes decoded as UTF-8.
"""

from __future__ import annotations

import os


def as_text(name: str) -> str:
    """The text to record for a name or a path that Python got from the system."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def as_path(text: str) -> str:
    """The name or path by which Python finds the file of a recorded text; see :func:`as_text`."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))
