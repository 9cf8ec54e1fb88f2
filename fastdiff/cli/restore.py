"""Restore images: paint what a mask hides, colour grey ones, enlarge small ones.

A row of the picture has the image as it was given, what the task leaves of it, and --count images
that the model makes of that. Files are cut to a square and brought to the model's size. inpaint
hides where the mask is white. colorize takes the mean of the colours; grey files are that already.
upscale takes means of squares of pixels, or files that are as small already.

The methods, all by a model that was trained for nothing of this: dps and pseudoinverse follow the
gradient of how well x0 fits what is known; repaint and known set the known part anew at each step,
repaint of a sampler with timesteps, known of a solver of the SDE.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.cli import machine_options, restoration
from fastdiff.cli.machine_options import machine, machine_facts
from fastdiff.cli.output import print_json
from fastdiff.cli.parsing import (
    add_checkpoint_argument,
    add_json_argument,
    add_seed_argument,
    add_weights_argument,
    check_seed,
    named_value,
    positive,
)
from fastdiff.cli.restoration import METHODS, Problem
from fastdiff.cli.sampler_options import (
    add_sampler_arguments,
    make_sampler,
    sampler_facts,
    steps_text,
)
from fastdiff.common.errors import InputError, check_memory
from fastdiff.data.image_grid import check_image_path, grid, save
from fastdiff.diffusion import SOLVERS

TASKS = ("inpaint", "colorize", "upscale")
FACTOR = 4  # default of --factor


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff restore``."""
    command.add_argument("task", choices=TASKS, help="what to do")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    add_checkpoint_argument(command)
    add_weights_argument(command)
    command.add_argument("--out", type=Path, default=Path("restored.png"), help="the picture")
    command.add_argument("--count", type=positive, default=4, help="images made of each")
    command.add_argument(
        "--mask",
        metavar="MASK",
        help="for inpaint: an image, white where to paint, of the images' size or the model's; or "
        "a box left,top,right,bottom in pixels of the model's size",
    )
    command.add_argument(
        "--factor", type=int, help=f"for upscale: how many times larger (default: {FACTOR})"
    )
    command.add_argument(
        "--class",
        dest="label",
        type=int,
        metavar="N",
        help="the images' class, of a class-conditional model; none if it was trained without, too",
    )
    command.add_argument("--method", choices=tuple(METHODS), default="dps", help="how")
    command.add_argument(
        "--method-option",
        action="append",
        default=[],
        type=named_value,
        metavar="NAME=VALUE",
        help="an option of the method: scale of dps; scale, noise (its deviation in the files) and "
        "data_std of pseudoinverse; resamplings and jump_length of repaint; may be repeated",
    )
    add_sampler_arguments(command, "one that suits the method")
    add_seed_argument(command)
    add_json_argument(command)
    machine_options.add_arguments(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Restore, write the picture, and return the exit code."""
    begin = time.perf_counter()
    check_seed(args.seed)
    check_image_path(args.out)
    with machine(args) as device:
        source = checkpoint.load(args.checkpoint, args.weights)
        problem = _problem(args, source)
        total = len(args.images) * args.count
        check_memory(total, source.channels, source.image_size, source.image_size)
        source.model.to(device)
        method, steps, preset = METHODS[args.method]
        preset = {} if args.sampler in SOLVERS else preset
        sampler = make_sampler(args, source, (method, steps), **preset)
        cond: dict[str, Any] = {}
        label = _label(args.label, source)
        if label is not None:
            cond["class_labels"] = torch.full((total,), label, dtype=torch.int64, device=device)
        try:
            samples = restoration.restore(
                source.diffusion(), problem, args.method, sampler, cond, each=args.count,
                options=dict(args.method_option), device=device, progress="restoring",
                generator=torch.Generator("cpu").manual_seed(args.seed),
            )  # fmt: skip
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"--method {args.method}: {error}") from None
        restored = samples.images.cpu()
        misfit = problem.measured.apply(restored) - problem.y.repeat_interleave(args.count, 0)
        rows = [problem.images.unsqueeze(1), problem.shown.unsqueeze(1)]
        rows += [restored.unflatten(0, (-1, args.count))]
        try:
            save(grid(torch.cat(rows, 1).flatten(0, 1), 2 + args.count), args.out)
        except ValueError as error:  # values that are not finite
            raise InputError(str(error)) from None
    facts = {
        "out": str(args.out),
        "task": args.task,
        "images": [str(path) for path in args.images],
        "checkpoint": str(checkpoint.resolve(args.checkpoint)),
        "weights": source.weights,
        "class": args.label,
        "method": args.method,
        "method_options": dict(args.method_option),
        **sampler_facts(sampler),
        "evaluations": float(samples.evaluations.double().mean()),
        "misfit": misfit.square().mean().sqrt().item(),
        "seed": args.seed,
        **machine_facts(device),
        "seconds": time.perf_counter() - begin,
    }
    if args.json:
        print_json(facts)
    else:
        _print(facts)
    return 0


def _problem(args: argparse.Namespace, source: Checkpoint) -> Problem:
    """What the task leaves of the images; InputError for options of another task."""
    for option, value, task in (
        ("--mask", args.mask, "inpaint"),
        ("--factor", args.factor, "upscale"),
    ):
        if value is not None and args.task != task:
            raise InputError(f"{option} is for {task}, not for {args.task}")
    if source.channels not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels, the model's have {source.channels}")
    files, size, channels = args.images, source.image_size, source.channels
    if args.task == "inpaint":
        return restoration.inpainting(files, size, channels, args.mask)
    if args.task == "colorize":
        return restoration.colorization(files, size, channels)
    factor = FACTOR if args.factor is None else args.factor
    return restoration.enlargement(files, size, channels, factor)


def _label(label: int | None, source: Checkpoint) -> int | None:
    """The class that the model is told, None for a model without classes."""
    if label is not None:
        source.check_labels([label])
        return label
    if source.classes and not source.null_class:
        raise InputError(
            f"the model has classes 0..{len(source.classes) - 1} and was not trained without: say "
            "--class"
        )
    return len(source.classes) if source.null_class else None


def _print(facts: dict[str, Any]) -> None:
    rows = [
        (facts["out"], f"{{method}}, {steps_text(facts)}, seed {{seed}}, in {{seconds:.1f}} s"),
        ("misfit", "{misfit:.3f} from what is known, on average (of -1 to 1)"),
        ("ran on", "{backend} backend, {isa}, {threads} threads"),
    ]
    for name, text in rows:
        print(f"{name:<11} {text.format(**facts)}")
