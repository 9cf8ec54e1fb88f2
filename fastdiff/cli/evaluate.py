"""Measure a model of the digits: class accuracy, Frechet distance, distance to training digits.

Each figure stands beside that of real digits which the model never saw. The classifier is an
independent one, fitted on real training digits; it and the feature space have nothing random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastdiff import checkpoint
from fastdiff.cli.common import (
    add_checkpoint_argument,
    add_json_argument,
    add_machine_arguments,
    add_sampler_arguments,
    add_seed_argument,
    check_seed,
    machine,
    make_sampler,
    positive,
    print_json,
    what_runs,
)
from fastdiff.evaluation import Evaluation, evaluate


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff eval``."""
    add_checkpoint_argument(command)
    command.add_argument("--samples", type=positive, default=1000, help="digits to generate")
    add_sampler_arguments(command)
    add_seed_argument(command)
    add_json_argument(command)
    add_machine_arguments(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Generate, measure, print, and return the exit code."""
    check_seed(args.seed)
    with machine(args) as device:
        found = checkpoint.load(args.checkpoint)
        found.model.to(device)
        sampler, ran = make_sampler(args, found), what_runs(device)
        measured = evaluate(
            found, sampler, samples=args.samples, guidance=args.guidance, seed=args.seed
        )
    facts = {
        "checkpoint": str(checkpoint.resolve(args.checkpoint)),
        "sampler": args.sampler,
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
        **ran,
        **measured.as_dict(),
    }
    if args.json:
        print_json(facts)
    else:
        _print(measured)
        print(
            "{samples} digits, {sampler}, {steps} steps, seed {seed}, in {seconds:.1f} s on the "
            "{backend} backend ({isa}, {threads} threads)".format(**facts)
        )
    return 0


def _print(measured: Evaluation) -> None:
    print(f"{'':<33} {'generated':>10} {'held-out real':>14}")
    for text, generated, real in (
        ("taken for the right digit", measured.accuracy, measured.accuracy_real),
        ("Frechet distance to training", measured.frechet, measured.frechet_real),
        (
            "nearest training digit, median",
            measured.nearest_train_median,
            measured.nearest_train_median_real,
        ),
        (
            "nearest training digit, smallest",
            measured.nearest_train_min,
            measured.nearest_train_min_real,
        ),
    ):
        print(f"{text:<33} {generated:>10.3f} {real:>14.3f}")
