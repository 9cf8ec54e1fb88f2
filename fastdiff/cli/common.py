"""What the sub-commands share: parsing, the machine, a sampler, JSON on standard output."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastdiff import samplers
from fastdiff.backend import NAMES, backend, describe, on_cuda
from fastdiff.checkpoint import Checkpoint
from fastdiff.errors import InputError


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"fastdiff: error: {message} (see {self.prog} --help)\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except those that say nothing, and keeps the description's lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        if action.default is True:  # a switch that is on: its --no- form turns it off
            return f"{action.help} (default: on)"
        return super()._get_help_string(action)


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def integers(text: str) -> tuple[int, ...]:
    """Integers such as 48,96,128 for argparse; ``none`` is none of them."""
    return () if text == "none" else tuple(int(part) for part in text.split(","))


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON or else as a string, for argparse."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_checkpoint_argument(command: argparse.ArgumentParser) -> None:
    """--checkpoint."""
    command.add_argument(
        "--checkpoint",
        default="digits",
        metavar="PATH",
        help="a checkpoint folder, the folder of a training run (its newest checkpoint), or the "
        "name of a model shipped with fastdiff",
    )


def add_sampler_arguments(command: argparse.ArgumentParser) -> None:
    """--sampler, --steps, --grid, --option, --guidance."""
    command.add_argument(
        "--sampler",
        choices=samplers.names(),
        default="ddim",
        metavar="NAME",
        help=f"the sampler: {', '.join(samplers.names())}",
    )
    command.add_argument("--steps", type=int, default=50, help="sampling steps")
    command.add_argument(
        "--grid",
        choices=samplers.grids.NAMES,
        help="which levels of noise are visited; the sampler's own choice if not given",
    )
    command.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=VALUE",
        help="an option of the sampler, such as eta=0.5, s_churn=20 or clip=null; may be repeated",
    )
    command.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="scale of classifier-free guidance, for models trained with --label-dropout",
    )


def add_seed_argument(command: argparse.ArgumentParser) -> None:
    """--seed."""
    command.add_argument("--seed", type=int, default=0, help="of all noise")


def add_json_argument(command: argparse.ArgumentParser) -> None:
    """--json."""
    command.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def add_machine_arguments(command: argparse.ArgumentParser) -> None:
    """--backend, --threads, --device."""
    command.add_argument(
        "--backend", choices=NAMES, default="auto", help="of fastdiff's operations"
    )
    command.add_argument("--threads", type=positive, help="CPU threads (default: as torch chooses)")
    command.add_argument("--device", default="cpu", help="where the model runs: cpu or cuda")


@contextmanager
def machine(args: argparse.Namespace) -> Iterator[torch.device]:
    """Apply --backend and --threads for a block, and give it the device of --device.

    Raises:
        InputError: a backend or device that this machine cannot use.
    """
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        text = str(error).split("\n")[0]
        raise InputError(f"--device {args.device} cannot be used: {text}") from None
    try:
        chosen = backend(args.backend)
    except RuntimeError as error:
        raise InputError(str(error)) from None
    threads = torch.get_num_threads()
    try:
        with chosen:
            torch.set_num_threads(args.threads or threads)
            yield device
    finally:
        torch.set_num_threads(threads)


def what_runs(device: torch.device) -> dict[str, Any]:
    """Backend, instruction set and threads of fastdiff's operations on ``device``."""
    if device.type == "cpu":
        return describe()
    name = (on_cuda() if device.type == "cuda" else None) or "reference"
    return {"backend": name, "isa": device.type, "threads": torch.get_num_threads()}


def process_seconds() -> float:
    """Seconds since this process began; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError):  # not Linux
        return 0.0


def check_seed(seed: int) -> None:
    """InputError unless torch takes the seed."""
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must lie in 0..2**63 - 1, got {seed}")


def make_sampler(args: argparse.Namespace, found: Checkpoint) -> samplers.Sampler:
    """The sampler that the arguments describe, for a checkpoint.

    Raises:
        InputError: steps, a grid or options that do not fit.
    """
    options = {"prediction": found.prediction, "grid": args.grid, **dict(args.option)}
    try:
        return samplers.make(args.sampler, found.schedule, args.steps, **options)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None


def note(text: str) -> None:
    """A line for the person watching, on standard error."""
    print(text, file=sys.stderr)


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON object on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))
