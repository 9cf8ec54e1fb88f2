"""Generate images from a checkpoint, and write them as a labelled grid.

A class-conditional model generates --per-class images of each of --classes, one row for each class;
an unconditional model generates --count images. The same seed gives the same images. Set-up
(imports, loading, a first step) is timed apart from sampling. --compare also times the same call on
the reference backend, twice each in turns, and reports the faster of the two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.cli import machine_options, sampler_options
from fastdiff.cli.machine_options import machine, machine_facts, process_seconds
from fastdiff.cli.output import note, print_json
from fastdiff.cli.parsing import (
    add_checkpoint_argument,
    add_json_argument,
    add_seed_argument,
    check_seed,
    integers,
    positive,
)
from fastdiff.cli.sampler_options import (
    guidance,
    guidance_facts,
    make_sampler,
    sampler_facts,
    steps_text,
)
from fastdiff.common.errors import InputError, check_memory
from fastdiff.data.image_grid import check_image_path, grid, save
from fastdiff.generation import Samples
from fastdiff.ops.backend import backend, cpu_missing
from fastdiff.samplers import Sampler
from fastdiff.sde import Solver

PER_CLASS, COUNT = 8, 32  # defaults of --per-class and --count
COLUMNS = 8  # columns of the grid of an unconditional model


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff sample``."""
    add_checkpoint_argument(command)
    command.add_argument("--out", type=Path, default=Path("samples.png"), help="the image to write")
    command.add_argument(
        "--classes", type=integers, help="numbers of the classes, such as 0,1,2; all if not given"
    )
    command.add_argument(
        "--per-class", type=positive, help=f"images of each class; {PER_CLASS} if not given"
    )
    command.add_argument(
        "--count",
        type=positive,
        help=f"images of an unconditional model; {COUNT} if not given",
    )
    sampler_options.add_arguments(command)
    add_seed_argument(command)
    command.add_argument(
        "--compare", action="store_true", help="time the same call on the reference backend too"
    )
    add_json_argument(command)
    machine_options.add_arguments(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Sample, write the grid, and return the exit code."""
    imports = process_seconds() if argv is None else 0.0  # unknown if called from other code
    begin = time.perf_counter()
    check_seed(args.seed)
    check_image_path(args.out)
    with machine(args) as device:
        source = checkpoint.load(args.checkpoint)
        if source.channels not in (1, 3):
            raise InputError(f"pictures have 1 or 3 channels, the model's have {source.channels}")
        source.model.to(device)
        guided = guidance(args, source, device)
        guide = guided["classifier"]
        # With a classifier, a model without classes takes the classifier's labels.
        labelled = source if guide is None else replace(source, classes=guide.classes)
        classes = _classes(args, labelled)
        count = args.count or COUNT
        columns, labels, rows = min(count, COLUMNS), None, None
        if classes is not None:
            columns = args.per_class or PER_CLASS
            count = columns * len(classes)
        check_memory(count, source.channels, source.image_size, source.image_size)
        if classes is not None:
            labels = [label for label in classes for _ in range(columns)]
            rows = [labelled.classes[label] for label in classes]
        sampler = make_sampler(args, source)
        one_step: Sampler | Solver
        if isinstance(sampler, Sampler):
            one_step = sampler.starting_at(sampler.steps - 1)
        else:
            one_step = Solver(sampler.sde, "probability-flow", 1)
        ran_on, compare = machine_facts(device), args.compare
        if compare and ran_on["backend"] == "reference":
            note(f"nothing to compare: the reference is what runs ({cpu_missing or 'as asked'})")
            compare = False
        loading = time.perf_counter() - begin

        def generate(name: str, sampler: Sampler | Solver, progress: bool) -> tuple[Samples, float]:
            begin = time.perf_counter()
            with backend(name):
                samples = source.generate(
                    sampler,
                    labels=labels,
                    count=count,
                    generator=torch.Generator("cpu").manual_seed(args.seed),
                    progress=progress and f"sampling ({name})",
                    **guided,
                )
            return samples, time.perf_counter() - begin

        first_step = generate(args.backend, one_step, False)[1]
        if compare:
            generate("reference", one_step, False)
        samples, seconds = generate(args.backend, sampler, True)
        try:
            save(grid(samples.images, columns, labels=rows), args.out)
        except ValueError as error:  # values that are not finite
            raise InputError(str(error)) from None
        reference_seconds = None
        if compare:  # the faster of two calls each, in turns, is less noisy than a single call
            reference_seconds = generate("reference", sampler, True)[1]
            seconds = min(seconds, generate(args.backend, sampler, True)[1])
            reference_seconds = min(reference_seconds, generate("reference", sampler, True)[1])
    facts = {
        "out": str(args.out),
        "checkpoint": str(checkpoint.resolve(args.checkpoint)),
        "images": count,
        "classes": classes,
        **sampler_facts(sampler),
        "evaluations": float(samples.evaluations.double().mean()),
        **guidance_facts(guided, args),
        "seed": args.seed,
        **ran_on,
        "setup_seconds": imports + loading + first_step,
        "import_seconds": imports,
        "loading_seconds": loading,
        "first_step_seconds": first_step,
        "sampling_seconds": seconds,
        "images_per_second": count / seconds,
        "reference_images_per_second": reference_seconds and count / reference_seconds,
        "speedup": reference_seconds and reference_seconds / seconds,
    }
    if args.json:
        print_json(facts)
    else:
        _print(facts)
    return 0


def _classes(args: argparse.Namespace, labelled: Checkpoint) -> Sequence[int] | None:
    """The class of each row of the grid; None for an unconditional model."""
    if not labelled.classes:
        if args.classes is not None or args.per_class is not None:
            raise InputError("the model has no classes: use --count, not --classes or --per-class")
        return None
    if args.count is not None:
        raise InputError("the model is class-conditional: use --per-class, not --count")
    classes = range(len(labelled.classes)) if args.classes is None else args.classes
    if not classes:
        raise InputError("--classes names no class")
    labelled.check_labels(classes)
    return list(classes)


def _print(facts: dict[str, Any]) -> None:
    rows = [
        (facts["out"], f"{{images}} images, {steps_text(facts)}, seed {{seed}}"),
        ("ran on", "{backend} backend, {isa}, {threads} threads"),
        (
            "set-up",
            "{setup_seconds:.2f} s (imports {import_seconds:.2f}, loading {loading_seconds:.2f}, "
            "first step {first_step_seconds:.2f})",
        ),
        ("sampling", "{sampling_seconds:.2f} s, {images_per_second:.1f} images/s"),
    ]
    if facts["speedup"] is not None:
        rows.append(
            ("reference", "{reference_images_per_second:.1f} images/s (ratio {speedup:.2f})")
        )
    for name, text in rows:
        print(f"{name:<11} {text.format(**facts)}")
