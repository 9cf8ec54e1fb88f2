"""What the sub-commands share: parsing, the machine, a sampler, JSON on standard output."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastdiff import samplers
from fastdiff.checkpoints import classifier_checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.common.errors import InputError
from fastdiff.data import datasets
from fastdiff.diffusion import METHODS, SOLVERS, Diffusion
from fastdiff.ops.backend import NAMES, backend, describe, on_cuda
from fastdiff.samplers import Sampler
from fastdiff.sde import Solver
from fastdiff.sde.solvers.by_name import STEPS_EACH

STEPS = 50  # of samplers with timesteps
# What suits each objective but ncsn: the sampler, and its steps.
DEFAULTS: dict[str, tuple[str, int | None]] = {
    "ddpm": ("ddim", STEPS),
    "hybrid": ("ddpm", STEPS),
    "vlb": ("ddpm", STEPS),
    "flow": ("unipc-2", STEPS),
    "dsm": ("adaptive", None),
    "edm": ("heun", STEPS // 2),
}


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
    """An integer of at least 1 and below 2**31, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    if value >= 2**31:
        raise argparse.ArgumentTypeError(f"must be below 2**31, got {value}")
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
    """--sampler, --steps, --grid, --option, --guidance, --classifier, --classifier-scale."""
    command.add_argument(
        "--sampler",
        choices=METHODS,
        metavar="NAME",
        help=f"on a fixed grid of timesteps: {', '.join(samplers.names())}; in continuous time: "
        f"{', '.join(SOLVERS)}; if not given, one that suits what the model was trained for",
    )
    command.add_argument(
        "--steps", type=int, help="sampling steps; ode and adaptive choose their own"
    )
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
        help="an option of the sampler, such as eta=0.5, clip=null, rtol=1e-4 or "
        "corrector=langevin; may be repeated",
    )
    command.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="scale of classifier-free guidance, for models trained with --label-dropout; 0 leaves "
        "the classes to --classifier",
    )
    command.add_argument(
        "--classifier",
        type=Path,
        metavar="PATH",
        help="guide by this classifier, which fastdiff train-classifier made for the model",
    )
    command.add_argument(
        "--classifier-scale", type=float, metavar="S", help="of its gradient (default: 1)"
    )


def add_reading_arguments(group: argparse._ActionsContainer) -> None:
    """--value-range, --skip-bad."""
    group.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("BLACK", "WHITE"),
        help="the values that are black and white in a folder's files of more than 8 bits a value: "
        "0 4095 for 12 bits in files of 16, say",
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="go on without the files of a folder that cannot be read, saying how many",
    )


def read_folder(args: argparse.Namespace, size: int, **options: Any) -> datasets.ImageSet:
    """The images of the folder --data, by the arguments of :func:`add_reading_arguments`.

    Args:
        args: the arguments.
        size: height and width.
        **options: see :func:`fastdiff.data.folder`.

    Raises:
        DataError: see there.
    """
    value_range = None if args.value_range is None else tuple(args.value_range)
    return datasets.folder(
        args.data, size, value_range=value_range, skip_bad=args.skip_bad, **options
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


def make_sampler(args: argparse.Namespace, found: Checkpoint) -> Sampler | Solver:
    """The sampler that the arguments describe, for a checkpoint.

    Raises:
        InputError: steps, a grid or options that do not fit.
    """
    diffusion, options = found.diffusion(), dict(args.option)
    method, steps = default_sampler(diffusion)
    if args.sampler is not None and args.sampler != method:
        method, steps = args.sampler, None if args.sampler in SOLVERS else STEPS
    if steps is not None and method not in SOLVERS:
        steps = min(steps, diffusion.path.num_timesteps)
    if args.grid is not None:
        if method in SOLVERS:
            raise InputError(f"--grid is for samplers with timesteps, {method} has none")
        options["grid"] = args.grid
    try:
        return diffusion.sampler(method, steps if args.steps is None else args.steps, **options)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None


def default_sampler(diffusion: Diffusion) -> tuple[str, int | None]:
    """The sampler and the steps that suit what a model was trained for."""
    objective = diffusion.objective
    if objective.levels is not None:
        return "annealed-langevin", objective.levels * STEPS_EACH
    return DEFAULTS[objective.name]


def guidance(args: argparse.Namespace, found: Checkpoint, device: torch.device) -> dict[str, Any]:
    """The guidance that the arguments describe, as ``Checkpoint.draw`` takes it.

    Raises:
        InputError: a classifier that cannot be read or was made for another kind of model, or a
            scale of it that is not finite or has no classifier.
    """
    guide, scale = None, args.classifier_scale
    if args.classifier is not None:
        guide = classifier_checkpoint.load(args.classifier)
        classifier_checkpoint.check_fits(guide, found)
        guide.model.to(device)
    elif scale is not None:
        raise InputError("--classifier-scale is for a --classifier, there is none")
    scale = 1.0 if scale is None else scale
    if not math.isfinite(scale):
        raise InputError(f"--classifier-scale must be finite, got {scale}")
    return {"guidance": args.guidance, "classifier": guide, "classifier_scale": scale}


def guidance_facts(guided: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """:func:`guidance`, its classifier by name; None for both where there is none."""
    if args.classifier is None:
        return {**guided, "classifier": None, "classifier_scale": None}
    return {**guided, "classifier": str(args.classifier)}


def sampler_facts(sampler: Sampler | Solver) -> dict[str, Any]:
    """The sampler's name and steps; None for one that chooses its own."""
    name = sampler.method if isinstance(sampler, Solver) else sampler.name
    return {"sampler": name, "steps": sampler.steps}


def steps_text(facts: Mapping[str, Any]) -> str:
    """``sampler_facts`` and the evaluations beside them, in words."""
    steps = "steps of its own" if facts["steps"] is None else f"{facts['steps']} steps"
    return f"{facts['sampler']}, {steps}, {facts['evaluations']:g} evaluations an image"


@contextmanager
def standard_output(own: bool) -> Iterator[None]:
    """A block that may print any character, and whose output has gone out when it ends.

    Args:
        own: the process has no other use of standard output, so what it does not take is dropped.

    Raises:
        OSError: standard output does not take everything: a full disk, a pipe that nobody reads.
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
            if own:  # else Python fails once more in its last moments
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise


def note(text: str) -> None:
    """A line for the person watching, on standard error."""
    print(text, file=sys.stderr)


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON object on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))
