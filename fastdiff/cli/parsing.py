"""Parsing of the command line: the parser, types of arguments, and common arguments."""

from __future__ import annotations

import argparse
import json
from typing import Any, NoReturn

import torch

from fastdiff.common.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"fastdiff: error: {message} (see {self.prog} --help)\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, except None, False and [], and keeps the description's lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        if action.default is True:  # a switch that is on: its --no- form turns it off
            return f"{action.help} (default: on)"
        return super()._get_help_string(action)


def positive(text: str) -> int:
    """An integer of at least 1 and below 2**31, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    if value >= 2**31:
        raise argparse.ArgumentTypeError(f"must be below 2**31, got {value}")
    return value


def integers(text: str) -> tuple[int, ...]:
    """Integers separated by commas, such as 48,96,128, or ``none``; for argparse."""
    return () if text == "none" else tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas, such as 0.999,0.9999, or ``none``; for argparse."""
    return () if text == "none" else tuple(float(part) for part in text.split(","))


LISTS = (integers, numbers)  # types of options whose one word has several values


def named_value(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON or else as a string, for argparse."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_dtype_argument(command: argparse.ArgumentParser) -> None:
    """Add --dtype, a key of :data:`DTYPES`."""
    command.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the weights in the file"
    )


def add_checkpoint_argument(command: argparse._ActionsContainer) -> None:
    """Add --checkpoint."""
    command.add_argument(
        "--checkpoint",
        default="digits",
        metavar="PATH",
        help="a checkpoint folder, the folder of a training run (its newest checkpoint), or the "
        "name of a model shipped with fastdiff",
    )


def add_weights_argument(command: argparse.ArgumentParser) -> None:
    """Add --weights, for ``checkpoint.load``."""
    command.add_argument(
        "--weights",
        metavar="NAME",
        help="of the checkpoint's weights: an average that the run kept, such as ema-0.9999 or "
        "std-0.05, or raw for those of the last step; the run's model if not given",
    )


def add_network_arguments(group: argparse._ActionsContainer) -> None:
    """Add --channels, --layers-per-block and --attention: the levels of a network to train."""
    group.add_argument(
        "--channels", type=integers, default="32,64,64", help="feature channels of each level"
    )
    group.add_argument(
        "--layers-per-block", type=positive, default=2, help="residual blocks in each level"
    )
    group.add_argument(
        "--attention", type=integers, default="1,2", help="levels with self-attention, or none"
    )


def add_seed_argument(command: argparse.ArgumentParser) -> None:
    """Add --seed, to be checked by :func:`check_seed`."""
    command.add_argument("--seed", type=int, default=0, help="of all noise")


def check_seed(seed: int) -> None:
    """InputError unless torch takes the seed."""
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must lie in 0..2**63 - 1, got {seed}")


def add_json_argument(command: argparse.ArgumentParser) -> None:
    """Add --json."""
    command.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
