"""The options of a command in a TOML file, and single ones as TABLE.KEY=VALUE.

Each group of options is a table of the file, with the group's title, and each option is a key of
it, with the option's name.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastdiff.cli.parsing import LISTS, integers, numbers, positive
from fastdiff.common import toml_file
from fastdiff.common.errors import InputError
from fastdiff.common.version import __version__
from fastdiff.data.file_names import as_path, as_text

NAME = "run.toml"  # of the file that a run writes into its folder
# Options that say which run it is, and are in no file.
CONTROLS = ("config", "set", "resume", "resume_if_any")
SINGLE = (None, "?")  # argparse's ``nargs`` of options with one value
_TITLES = ("positional arguments", "options")  # argparse's own groups

# For types of options: the values that a file may have, and what these are in words.
_INTEGERS: tuple[tuple[type, ...], str] = ((int,), "an integer")
_NUMBERS: tuple[tuple[type, ...], str] = ((int, float), "a number")
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: _INTEGERS,
    positive: _INTEGERS,
    integers: _INTEGERS,
    float: _NUMBERS,
    numbers: _NUMBERS,
    None: ((str,), "a string"),
    Path: ((str,), "a string"),
}
_OTHER: tuple[tuple[type, ...], str] = ((str, int, float), "a string or a number")


def keys(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a command by their keys, such as ``training.steps``."""
    return {
        f"{group.title}.{action.dest}": action
        for group in command._action_groups
        if group.title not in _TITLES
        for action in group._group_actions
        if action.dest not in CONTROLS
    }


def read(command: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """The values in a file, by the options' names.

    Raises:
        OSError: the file cannot be read.
        InputError: the file is not TOML, has a key that is no option, or a value that the option
            does not take.
    """
    try:
        tables = toml_file.read(path)
    except ValueError as error:
        raise InputError(str(error)) from None
    known, values = keys(command), {}
    for table, entries in tables.items():
        if not isinstance(entries, dict):
            raise InputError(f"{path}: {_unknown(table, known)}")
        for key, value in entries.items():
            name = f"{table}.{key}"
            action = _action(name, known, str(path))
            values[action.dest] = _checked(action, value, f"{path}: {name}")
    return values


def assigned(command: argparse.ArgumentParser, texts: Iterable[str]) -> dict[str, Any]:
    """The values of texts TABLE.KEY=VALUE, by the options' names.

    VALUE is written as on the command line, that of a switch as true or false; several words are
    separated by commas.

    Raises:
        InputError: a text of another form, a key that is no option, or a value that the option does
            not take.
    """
    known, values = keys(command), {}
    for text in texts:
        name, equals, word = text.partition("=")
        if not equals:
            raise InputError(f"--set must be TABLE.KEY=VALUE, got {text!r}")
        action, where = _action(name.strip(), known, "--set"), f"--set {name}"
        value: Any = word
        if action.nargs == 0:
            value = {"true": True, "false": False}.get(word, word)
            values[action.dest] = _checked(action, value, where)
        else:
            parts = [word] if action.nargs in SINGLE else word.split(",")
            values[action.dest] = _converted(action, parts, where)
    return values


def write(
    command: argparse.ArgumentParser, args: argparse.Namespace, path: Path, name: str
) -> None:
    """Write all options as a file that :func:`read` reads, each with its help as a comment.

    ``name`` is that of the command, for the line that says how to repeat the run. An option without
    a value, and the folder of the run, which another run cannot have, are comments. The file is
    replaced as a whole.
    """
    lines = [
        toml_file.comment(
            f"The options of this run, written by fastdiff {__version__}. To repeat it: "
            f"fastdiff {name} --config {path.name} --out FOLDER"
        )
    ]
    table = ""
    for full, action in keys(command).items():
        now, _, key = full.partition(".")
        if now != table:
            table = now
            lines += ["", f"[{table}]"]
        value = None if action.dest == "out" else getattr(args, action.dest)
        if isinstance(value, (str, Path)):
            value = as_text(str(value))
        lines += [toml_file.comment(action.help or ""), toml_file.entry(key, value)]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _action(name: str, known: dict[str, argparse.Action], where: str) -> argparse.Action:
    if name not in known:
        raise InputError(f"{where}: {_unknown(name, known)}")
    return known[name]


def _unknown(name: str, known: dict[str, argparse.Action]) -> str:
    """The error for a key that is no option: it names the same key of another table, or the one
    that is spelt most alike.
    """
    name = name.replace("-", "_")
    last = name.rpartition(".")[2]
    same = [key for key in known if key.rpartition(".")[2] == last]
    nearest = same or difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"no option has the key {name}; the nearest is {nearest[0]}"


def _checked(action: argparse.Action, value: Any, where: str) -> Any:
    """The value of an option, from a value of TOML."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{where} must be true or false, got {value!r}")
        return value
    types, wanted = _KINDS.get(action.type, _OTHER)
    several = action.nargs not in SINGLE or action.type in LISTS
    parts = value if several and isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, types) or isinstance(part, bool):
            words = f"{wanted}, or an array of such" if several else wanted
            raise InputError(f"{where} must be {words}, got {value!r}")
    texts = [as_path(part) if isinstance(part, str) else str(part) for part in parts]
    if action.type in LISTS:
        texts = [",".join(texts) or "none"]
    return _converted(action, texts, where)


def _converted(action: argparse.Action, texts: Sequence[str], where: str) -> Any:
    """The value of an option, from words as the command line has them."""
    convert: Callable[[str], Any] = action.type if callable(action.type) else str
    if isinstance(action.nargs, int) and len(texts) != action.nargs:
        raise InputError(f"{where} must be {action.nargs} values, got {len(texts)}")
    values = []
    for text in texts:
        try:
            value = convert(text)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{where}: {error}") from None
        except (TypeError, ValueError):
            wanted = _KINDS.get(action.type, _OTHER)[1]
            raise InputError(f"{where} must be {wanted}, got {text!r}") from None
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise InputError(f"{where} must be one of {choices}, got {text!r}")
        values.append(value)
    return values[0] if action.nargs in SINGLE else values
