"""TOML files of flat tables: how they are read, and how a key with a comment is written."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WIDTH = 98  # characters in a line of a comment


def read(path: Path) -> dict[str, Any]:
    """The tables in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not TOML; the text begins with the path.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def entry(key: str, value: Any) -> str:
    """The line of a key; without a value if that is None, or text that TOML cannot hold.

    Args:
        key: a bare key.
        value: a boolean, a number, a string, a sequence of these, or None.
    """
    text = None if value is None else literal(value)
    return f"# {key} =" if text is None else f"{key} = {text}"


def comment(text: str) -> str:
    """A text as lines of a comment."""
    return textwrap.fill(" ".join(text.split()), WIDTH, initial_indent="# ", subsequent_indent="# ")


def literal(value: Any) -> str | None:
    """A value as TOML writes it; None for text with parts of letters (surrogates).

    Python's ``repr`` of a finite number, inf and nan are what TOML takes as well. Strings differ
    from those of JSON in that TOML wants the character 127 escaped.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        if any(0xD800 <= ord(letter) < 0xE000 for letter in value):
            return None
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Sequence):
        parts = [literal(part) for part in value]
        return None if None in parts else f"[{', '.join(map(str, parts))}]"
    raise TypeError(f"no value of TOML: {value!r}")
