"""Measure a model of the digits: class accuracy, Frechet distance, distance to training digits.

Each figure stands beside that of real digits which the model never saw. The classifier is an
independent one, fitted on real training digits; it and the feature space have nothing random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastdiff.checkpoints import checkpoint
from fastdiff.cli.options import (
    add_checkpoint_argument,
    add_json_argument,
    add_machine_arguments,
    add_sampler_arguments,
    add_seed_argument,
    check_seed,
    guidance,
    guidance_facts,
    machine,
    make_sampler,
    positive,
    print_json,
    sampler_facts,
    steps_text,
    what_runs,
)
from fastdiff.evaluation import Bits, Evaluation, evaluate, measure_bits

BITS = 16  # held-out digits, if the command line does not say


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff eval``."""
    add_checkpoint_argument(command)
    command.add_argument("--samples", type=positive, default=1000, help="digits to generate")
    command.add_argument(
        "--bits",
        type=positive,
        nargs="?",
        const=BITS,
        metavar="N",
        help="also measure bits per value of N held-out digits, by the variational bound where the "
        f"model has one and by the probability-flow ODE; {BITS} if N is not given",
    )
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
        guided = guidance(args, found, device)
        measured = evaluate(found, sampler, samples=args.samples, seed=args.seed, **guided)
        bits = None if args.bits is None else measure_bits(found, args.bits, seed=args.seed)
    facts = {
        "checkpoint": str(checkpoint.resolve(args.checkpoint)),
        **sampler_facts(sampler),
        **guidance_facts(guided, args),
        "seed": args.seed,
        **ran,
        **measured.as_dict(),
        **({} if bits is None else bits.as_dict()),
    }
    if args.json:
        print_json(facts)
    else:
        _print(measured, bits)
        print(
            f"{{samples}} digits, {steps_text(facts)}, seed {{seed}}, in {{seconds:.1f}} s on the "
            "{backend} backend ({isa}, {threads} threads)".format(**facts)
        )
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
    for text, found in () if bits is None else (("bound", bits.bits_bound), ("ODE", bits.bits_ode)):
        if found is not None:
            print(f"{f'bits per value, by the {text}':<33} {'':>10} {found:>14.3f}")
