"""Generate images from a checkpoint, and write them as a labelled grid.

A class-conditional model generates --per-class images of each of --classes, one row for each class;
an unconditional model generates --count images. The same seed gives the same images. Set-up
(imports, loading, a first step, in which the model is compiled) is timed apart from sampling.
--compare also times the same call in plain PyTorch: the reference backend in eager mode, in the
memory format in which it is faster. Both are called three times in turns; the medians are reported.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.cli import contrast_options, interpolation, machine_options, sampler_options
from fastdiff.cli.machine_options import machine, machine_facts, process_seconds
from fastdiff.cli.output import note, print_json
from fastdiff.cli.parsing import (
    add_checkpoint_argument,
    add_json_argument,
    add_seed_argument,
    add_weights_argument,
    check_seed,
    integers,
    positive,
)
from fastdiff.cli.sampler_options import (
    guidance,
    guidance_facts,
    make_sampler,
    read_model,
    sampler_facts,
    steps_text,
)
from fastdiff.common.errors import InputError, check_memory
from fastdiff.common.world import process_group
from fastdiff.data.image_grid import check_image_path, grid, save
from fastdiff.generation import Samples
from fastdiff.ops.backend import backend, cpu_missing
from fastdiff.samplers import Sampler
from fastdiff.sampling.quick import is_compiled
from fastdiff.sde import Solver

PER_CLASS, COUNT = 8, 32  # defaults of --per-class and --count
COLUMNS = 8  # columns of the grid of an unconditional model
TURNS = 3  # timed calls of --compare, of each side
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
NEXT = [
    ("next", "other samplers: fastdiff sample --sampler ddpm --steps 100"),
    ("", "your own images: fastdiff train --data FOLDER --out runs/mine"),
    ("", "everything else: fastdiff --help, README.md and docs/"),
]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff sample``."""
    add_checkpoint_argument(command)
    add_weights_argument(command)
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
    command.add_argument(
        "--interpolate", nargs=2, metavar=("A", "B"),
        help="a row of images from A to B, two image files or two seeds: their noise is found by "
        "the probability-flow ODE and turned from one to the other",
    )  # fmt: skip
    sampler_options.add_arguments(command)
    contrast_options.add_arguments(command)
    add_seed_argument(command)
    command.add_argument(
        "--compare", action="store_true", help="time the same call in plain PyTorch too"
    )
    add_json_argument(command)
    machine_options.add_arguments(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Sample, write the grid, and return the exit code."""
    imports = process_seconds() if argv is None else 0.0  # unknown if called from other code
    begin = time.perf_counter()
    check_seed(args.seed)
    check_image_path(args.out)
    with machine(args) as device, process_group(device) as world:
        if args.compare and world.count > 1:
            raise InputError("--compare is for one process")
        if args.compare and args.precision != "fast":
            raise InputError(f"--compare is for the precision fast, got {args.precision}")
        source = read_model(args, device)
        if source.channels not in (1, 3):
            raise InputError(f"pictures have 1 or 3 channels, the model's have {source.channels}")
        guided = guidance(args, source, device)
        contrast = contrast_options.contrast(args, source, device)
        guide = guided["classifier"]
        # With a classifier, a model without classes takes the classifier's labels.
        labelled = source if guide is None else replace(source, classes=guide.classes)
        classes = _classes(args, labelled)
        count = args.count or (COUNT if args.interpolate is None else COLUMNS)
        columns, labels, rows = min(count, COLUMNS), None, None
        if args.interpolate is not None:
            columns = count  # one row
        if classes is not None:
            columns = args.per_class or PER_CLASS
            count = columns * len(classes)
        check_memory(count, source.channels, source.image_size, source.image_size)
        if classes is not None:
            labels = [label for label in classes for _ in range(columns)]
            rows = [labelled.classes[label] for label in classes]
        sampler = make_sampler(args, source)
        noise = None
        if args.interpolate is not None:
            interpolation.check_sampler(sampler)
            of_rows = classes if source.classes and classes is not None else [None]
            noise = interpolation.noise_between(args.interpolate, source, of_rows, columns)
        one_step: Sampler | Solver
        if isinstance(sampler, Sampler):
            one_step = sampler.starting_at(sampler.steps - 1)
        else:
            one_step = Solver(sampler.sde, "probability-flow", 1)
        ran_on, compare = machine_facts(device), args.compare
        captured = device.type == "cuda" and isinstance(sampler, Sampler)
        eager = "CUDA graph" if captured else "eager mode"
        mode = "compiled" if is_compiled(source.model) else eager
        if args.precision != "fast":
            mode = f"compiled, precision {args.precision}"
        if compare and ran_on["backend"] == "reference":
            note(f"nothing to compare: the reference is what runs ({cpu_missing or 'as asked'})")
            compare = False
        loading = time.perf_counter() - begin

        def generate(name: str, sampler: Sampler | Solver, **options: Any) -> tuple[Samples, float]:
            begin = time.perf_counter()
            with backend(name):
                samples = source.generate(
                    sampler,
                    labels=labels,
                    count=count,
                    noise=noise,
                    generator=torch.Generator("cpu").manual_seed(args.seed),
                    world=world,
                    **{"progress": False, **guided, **contrast, **options},
                )
            return samples, time.perf_counter() - begin

        title = f"sampling ({args.backend})" if world.first else False
        ours = partial(generate, args.backend, progress=title)
        first_step = generate(args.backend, one_step)[1]
        layout = _best_layout(partial(generate, "reference", one_step)) if compare else None
        samples, seconds = ours(sampler)
        if not world.first:  # the first process writes the images of all
            return 0
        try:
            save(grid(samples.images, columns, labels=rows), args.out)
        except ValueError as error:  # values that are not finite
            raise InputError(str(error)) from None
        reference_seconds = None
        if layout is not None:
            plain = partial(generate, "reference", progress="sampling (plain PyTorch)",
                            mode="eager", memory_format=LAYOUTS[layout])  # fmt: skip
            times = [(seconds, plain(sampler)[1])]
            times += [(ours(sampler)[1], plain(sampler)[1]) for _ in range(TURNS - 1)]
            seconds, reference_seconds = map(median, zip(*times, strict=True))
    facts = {
        "out": str(args.out),
        "checkpoint": str(checkpoint.resolve(args.checkpoint)),
        "weights": source.weights,
        "images": count,
        "classes": classes,
        **sampler_facts(sampler),
        "evaluations": float(samples.evaluations.double().mean()),
        **guidance_facts(guided, args),
        **contrast_options.contrast_facts(args),
        "interpolate": args.interpolate,
        "seed": args.seed,
        **ran_on,
        "mode": mode,
        "setup_seconds": imports + loading + first_step,
        "import_seconds": imports,
        "loading_seconds": loading,
        "first_step_seconds": first_step,
        "sampling_seconds": seconds,
        "images_per_second": count / seconds,
        "reference_images_per_second": reference_seconds and count / reference_seconds,
        "reference_layout": layout,
        "speedup": reference_seconds and reference_seconds / seconds,
    }
    if args.json:
        print_json(facts)
    else:
        _print(facts)
    return 0


def _best_layout(generate: Callable[..., tuple[Samples, float]]) -> str:
    """The memory format, of ``LAYOUTS``, in which eager mode is faster here."""
    seconds = {}
    for name, memory_format in LAYOUTS.items():
        # The first call allocates memory and warms caches.
        seconds[name] = [generate(mode="eager", memory_format=memory_format)[1] for _ in "12"][-1]
    return min(seconds, key=lambda name: seconds[name])


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
        ("ran on", "{backend} backend, {isa}, {threads} threads, {mode}"),
        (
            "set-up",
            "{setup_seconds:.2f} s (imports {import_seconds:.2f}, loading {loading_seconds:.2f}, "
            "first step {first_step_seconds:.2f})",
        ),
        ("sampling", "{sampling_seconds:.2f} s, {images_per_second:.1f} images/s"),
    ]
    if facts["speedup"] is not None:
        plain = "{reference_images_per_second:.1f} images/s in eager mode, {reference_layout}"
        rows += [("PyTorch", f"{plain} (ratio {{speedup:.2f}})"), *NEXT]
    for name, text in rows:
        print(f"{name:<11} {text.format(**facts)}")
