"""Measure a model: of the digits by its classes, of any images against a reference.

Without --against, a model of the digits is measured by class accuracy, Frechet distance and
distance to the training digits. The classifier is independent of the model and fitted on the real
training digits; the classifier and the feature space are deterministic.

With --against, images that the model generates, or the files of --images, are compared with real
ones: Frechet and kernel distance, precision, recall, density, coverage, and the distance to the
nearest real image. Each figure is also computed for held-out real images where there are some.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastdiff.checkpoints import checkpoint
from fastdiff.cli import (
    contrast_options,
    evaluate_against,
    machine_options,
    reference_options,
    sampler_options,
)
from fastdiff.cli.machine_options import machine, machine_facts
from fastdiff.cli.output import print_json
from fastdiff.cli.parsing import (
    add_checkpoint_argument,
    add_json_argument,
    add_seed_argument,
    add_weights_argument,
    check_seed,
    positive,
)
from fastdiff.cli.sampler_options import (
    cost_text,
    guidance,
    guidance_facts,
    make_sampler,
    read_model,
    sampler_facts,
)
from fastdiff.common.errors import InputError
from fastdiff.common.world import process_group
from fastdiff.evaluation import Bits, Evaluation, evaluate, measure_bits

BITS = 16  # default number of held-out digits for --bits
DIGITS = 1000  # default number of digits to generate


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff eval``."""
    judged = command.add_mutually_exclusive_group()
    add_checkpoint_argument(judged)
    add_weights_argument(command)
    judged.add_argument(
        "--images", type=Path, metavar="FOLDER", help="compare these images, and generate none"
    )
    command.add_argument(
        "--samples",
        type=positive,
        help=f"images to generate (default: {DIGITS} digits; with --against as many as the "
        f"reference has, at most {evaluate_against.MOST})",
    )
    evaluate_against.add_arguments(command)
    command.add_argument(
        "--bits",
        type=positive,
        nargs="?",
        const=BITS,
        metavar="N",
        help="also measure bits per value of N held-out digits, by the variational bound where the "
        f"model has one and by the probability-flow ODE; {BITS} if N is not given",
    )
    sampler_options.add_arguments(command)
    contrast_options.add_arguments(command)
    add_seed_argument(command)
    add_json_argument(command)
    machine_options.add_arguments(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Generate, measure, print, and return the exit code."""
    check_seed(args.seed)
    if args.against is not None:
        if args.bits is not None:
            raise InputError("--bits is for the digits' own measures, without --against")
        return evaluate_against.run(args)
    reference_options.check_unused(args)
    with machine(args) as device, process_group(device) as world:
        source = read_model(args, device)
        sampler, ran_on = make_sampler(args, source), machine_facts(device)
        guided = guidance(args, source, device)
        contrast = contrast_options.contrast(args, source, device)
        samples = args.samples or DIGITS
        measured = evaluate(
            source, sampler, samples=samples, seed=args.seed, world=world, progress=world.first,
            **guided, **contrast,
        )  # fmt: skip
        if not world.first:  # what is measured is the same in all processes
            return 0
        bits = None if args.bits is None else measure_bits(source, args.bits, seed=args.seed)
    facts = {
        "checkpoint": str(checkpoint.resolve(args.checkpoint)),
        "weights": source.weights,
        **sampler_facts(sampler),
        **guidance_facts(guided, args),
        **contrast_options.contrast_facts(args),
        "seed": args.seed,
        **ran_on,
        **measured.as_dict(),
        **({} if bits is None else bits.as_dict()),
    }
    if args.json:
        print_json(facts)
    else:
        _print(measured, bits)
        print(cost_text(facts, "digits"))
    return 0


def _print(measured: Evaluation, bits: Bits | None) -> None:
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
    for text, value in () if bits is None else (("bound", bits.bits_bound), ("ODE", bits.bits_ode)):
        if value is not None:
            print(f"{f'bits per value, by the {text}':<33} {'':>10} {value:>14.3f}")
