"""The command line, ``fastdiff COMMAND``: the commands are those of :data:`COMMANDS`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastdiff.cli import (
    average,
    compare_runs,
    convert,
    distill,
    doctor,
    evaluate,
    export,
    restore,
    sample,
    train,
    train_classifier,
)
from fastdiff.cli.output import standard_output
from fastdiff.cli.parsing import Formatter, Parser
from fastdiff.common.errors import InputError, memory_refused
from fastdiff.common.version import __version__

__all__ = ["main", "parser"]

COMMANDS = {
    "train": train,
    "distill": distill,
    "sample": sample,
    "restore": restore,
    "eval": evaluate,
    "report": compare_runs,
    "train-classifier": train_classifier,
    "average": average,
    "export": export,
    "convert": convert,
    "doctor": doctor,
}


def parser() -> argparse.ArgumentParser:
    """The argument parser; each sub-command's module adds its own options."""
    top = Parser(prog="fastdiff", description="Train, sample and measure diffusion models.")
    top.add_argument("--version", action="version", version=f"fastdiff {__version__}")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").split("\n\n", 1)
        module.add_arguments(
            commands.add_parser(
                name,
                help=text[0].rstrip("."),
                description="\n\n".join(text),
                formatter_class=Formatter,
            )
        )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after the program's name; None for the arguments of this process.

    Returns:
        The exit code: 0 for success, 1 if a self-check failed, 2 for an error of the input or the
        machine (with one line on standard error), 128 + n after signal n. Any other exception is a
        bug and is raised.
    """
    try:
        with standard_output(own=argv is None):
            args = parser().parse_args(argv)
            return COMMANDS[args.command].run(args, argv)
    except InputError as error:
        reason = str(error)
    except OSError as error:  # an error of the machine: a full disk, a missing permission
        reason = str(error)
    except (MemoryError, RuntimeError, ValueError) as error:
        refused = memory_refused(error)
        if refused is None:
            raise
        reason = refused
    except KeyboardInterrupt:
        print("fastdiff: interrupted", file=sys.stderr)
        return 130
    line = " ".join(part.strip() for part in reason.splitlines())
    print(f"fastdiff: error: {line}", file=sys.stderr)
    return 2
