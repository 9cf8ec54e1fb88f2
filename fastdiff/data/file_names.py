"""Names of files as text that means the same in every locale.

Python reads a file name by the locale: "café" is "caf\\udcc3\\udca9" where LANG is C and UTF-8 is
off. What is recorded, and compared later on another machine, is the name's bytes read as UTF-8.
"""

from __future__ import annotations

import os


def as_text(name: str) -> str:
    """The text to record for a name or a path that Python has read from the system."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def as_path(text: str) -> str:
    """The name or path that Python finds by recorded text, the inverse of :func:`as_text`."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))
