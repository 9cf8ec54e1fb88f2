"""Every ``fastdiff`` command of the documentation is one that the parser takes."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

from fastdiff import cli

COMMAND = re.compile(r"^ {4,}((?:[A-Z_]+=\S+ )?fastdiff .*)$", re.M)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
PIPS = {"--no-build-isolation"}  # an option of pip


def blocks(text: str) -> str:
    """The text with continued lines joined and the comments of commands left out."""
    return re.sub(r"[ ]{2,}#.*", "", re.sub(r" *\\\n\s*", " ", text))


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def test_commands_parse(page):
    for command in COMMAND.findall(blocks(page.read_text("utf-8"))):
        words = shlex.split(command)
        words = words[words.index("fastdiff") + 1 :]
        try:
            cli.parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{page.name}: {command}")


def test_named_options_exist(page):
    """Those in running text: `fastdiff train --resume`, or `--resume` alone."""
    every = {o for p in subparsers().values() for a in p._actions for o in a.option_strings}
    for span in re.findall(r"`((?:fastdiff |--)[^`]*)`", page.read_text("utf-8")):
        words = span.split()
        known = every
        if words[0] == "fastdiff":
            assert words[1] in cli.COMMANDS, span
            known = {o for a in subparsers()[words[1]]._actions for o in a.option_strings}
        assert set(OPTION.findall(span)) <= known | PIPS, span


def test_every_command_is_described():
    from benchmarks import tables

    text = (tables.ROOT / "docs" / "command-line.md").read_text("utf-8")
    assert re.findall(r"^\| `fastdiff ([a-z-]+)` \|", text, re.M) == list(cli.COMMANDS)
