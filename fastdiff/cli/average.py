"""Average weights after training: to any length from a run's snapshots, or over checkpoints.

--run takes a run that was trained with --ema-std, and makes the power function's average of the
relative standard deviation --std; --checkpoints averages whole models. The result is a checkpoint
without a training state.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastdiff.checkpoints import checkpoint
from fastdiff.cli.output import print_json
from fastdiff.cli.parsing import (
    DTYPES,
    add_dtype_argument,
    add_json_argument,
    add_weights_argument,
    positive,
)
from fastdiff.common.errors import InputError
from fastdiff.training import post_hoc


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff average``."""
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="folder of a run with snapshots")
    what.add_argument(
        "--checkpoints", nargs="+", metavar="PATH", help="checkpoints of one network to average"
    )
    command.add_argument("--std", type=float, help="of the average's profile, relative; with --run")
    command.add_argument(
        "--step", type=positive, help="of the average; that of the newest snapshot if not given"
    )
    add_weights_argument(command)
    command.add_argument("--out", type=Path, required=True, help="the folder to create")
    add_dtype_argument(command)
    add_json_argument(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Average, print what was written, and return the exit code."""
    residual = None
    if args.run is not None:
        if args.std is None:
            raise InputError("--run needs --std, the length of the average: for example 0.1")
        if args.weights is not None:
            raise InputError("--weights is for --checkpoints: a run's snapshots are combined")
        average, combination = post_hoc.reconstruct(args.run, args.std, args.step)
        residual = combination.residual
        text = f"{len(combination.coefficients)} snapshots, residual {residual:.2g} of its profile"
    else:
        if args.std is not None or args.step is not None:
            raise InputError("--std and --step are for --run")
        average = post_hoc.mean(args.checkpoints, args.weights)
        text = f"{len(args.checkpoints)} checkpoints"
    checkpoint.export(average, args.out, DTYPES[args.dtype])
    if args.json:
        facts = {"out": str(args.out), "step": average.step, "weights": average.weights}
        print_json({**facts, "residual": residual})
    else:
        print(f"{args.out}: {average.weights} at step {average.step}, of {text}")
    return 0
