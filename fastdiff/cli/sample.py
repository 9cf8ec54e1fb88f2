"""Draw images from a checkpoint into a labelled grid.

A class-conditional model draws --per-class images of each of --classes, one row a class; an
unconditional one draws --count. One seed always gives the same images. Set-up (imports, loading, a
first step) is timed apart from sampling; --compare times the same call on the reference backend,
twice each in turns, and gives the faster ones.
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
from fastdiff.cli.options import (
    add_checkpoint_argument,
    add_json_argument,
    add_machine_arguments,
    add_sampler_arguments,
    add_seed_argument,
    check_seed,
    guidance,
    guidance_facts,
    integers,
    machine,
    make_sampler,
    note,
    positive,
    print_json,
    process_seconds,
    sampler_facts,
    steps_text,
    what_runs,
)
from fastdiff.common.errors import InputError, check_memory
from fastdiff.data.image_grid import check_image_path, grid, save
from fastdiff.generation import Drawn
from fastdiff.ops.backend import backend, cpu_missing
from fastdiff.samplers import Sampler
from fastdiff.sde import Solver

PER_CLASS, COUNT = 8, 32  # images, if the command line does not say
COLUMNS = 8  # of the grid of an unconditional model


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff sample``."""
    add_checkpoint_argument(command)
    command.add_argument("--out", type=Path, default=Path("samples.png"), help="the image to write")
    command.add_argument(
        "--classes", type=integers, help="numbers of the classes to draw, 0,1,2; all if not given"
    )
    command.add_argument(
        "--per-class", type=positive, help=f"images of each class; {PER_CLASS} if not given"
    )
    command.add_argument(
        "--count",
        type=positive,
        help=f"images of an unconditional model; {COUNT} if not given",
    )
    add_sampler_arguments(command)
    add_seed_argument(command)
    command.add_argument(
        "--compare", action="store_true", help="time the same call on the reference backend too"
    )
    add_json_argument(command)
    add_machine_arguments(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Sample, write the grid, and return the exit code."""
    imports = process_seconds() if argv is None else 0.0  # called from other code: none
    begin = time.perf_counter()
    check_seed(args.seed)
    check_image_path(args.out)
    with machine(args) as device:
        found = checkpoint.load(args.checkpoint)
        if found.channels not in (1, 3):
            raise InputError(f"pictures have 1 or 3 channels, the model's have {found.channels}")
        found.model.to(device)
        guided = guidance(args, found, device)
        guide = guided["classifier"]
        # A model without classes has those of its classifier.
        known = found if guide is None else replace(found, classes=guide.classes)
        classes = _classes(args, known)
        count = args.count or COUNT
        columns, labels, rows = min(count, COLUMNS), None, None
        if classes is not None:
            columns = args.per_class or PER_CLASS
            count = columns * len(classes)
        check_memory(count, found.channels, found.image_size, found.image_size)
        if classes is not None:
            labels = [label for label in classes for _ in range(columns)]
            rows = [known.classes[label] for label in classes]
        sampler = make_sampler(args, found)
        one_step: Sampler | Solver
        if isinstance(sampler, Sampler):
            one_step = sampler.starting_at(sampler.steps - 1)
        else:
            one_step = Solver(sampler.sde, "probability-flow", 1)
        ran, compare = what_runs(device), args.compare
        if compare and ran["backend"] == "reference":
            note(f"nothing to compare: the reference is what runs ({cpu_missing or 'as asked'})")
            compare = False
        loading = time.perf_counter() - begin

        def draw(name: str, sampler: Sampler | Solver, progress: bool) -> tuple[Drawn, float]:
            begin = time.perf_counter()
            with backend(name):
                drawn = found.draw(
                    sampler,
                    labels=labels,
                    count=count,
                    generator=torch.Generator("cpu").manual_seed(args.seed),
                    progress=progress and f"sampling ({name})",
                    **guided,
                )
            return drawn, time.perf_counter() - begin

        first_step = draw(args.backend, one_step, False)[1]
        if compare:
            draw("reference", one_step, False)
        drawn, seconds = draw(args.backend, sampler, True)
        try:
            save(grid(drawn.images, columns, labels=rows), args.out)
        except ValueError as error:  # neither 1 nor 3 channels, or values that are not finite
            raise InputError(str(error)) from None
        reference_seconds = None
        if compare:  # the faster of two calls each, in turns: a moment's noise decides nothing then
            reference_seconds = draw("reference", sampler, True)[1]
            seconds = min(seconds, draw(args.backend, sampler, True)[1])
            reference_seconds = min(reference_seconds, draw("reference", sampler, True)[1])
    facts = {
        "out": str(args.out),
        "checkpoint": str(checkpoint.resolve(args.checkpoint)),
        "images": count,
        "classes": classes,
        **sampler_facts(sampler),
        "evaluations": float(drawn.evaluations.double().mean()),
        **guidance_facts(guided, args),
        "seed": args.seed,
        **ran,
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


def _classes(args: argparse.Namespace, found: Checkpoint) -> Sequence[int] | None:
    """The class of each row; None for an unconditional model."""
    if not found.classes:
        if args.classes is not None or args.per_class is not None:
            raise InputError("the model has no classes: say --count, not --classes or --per-class")
        return None
    if args.count is not None:
        raise InputError("the model is class-conditional: say --per-class, not --count")
    classes = range(len(found.classes)) if args.classes is None else args.classes
    if not classes:
        raise InputError("--classes names no class")
    found.check_labels(classes)
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
