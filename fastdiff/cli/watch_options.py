"""The options of what is watched in training: images to validate with, and loggers."""

from __future__ import annotations

import argparse

from fastdiff.cli import data_options
from fastdiff.common.errors import InputError
from fastdiff.data.training_images import TrainingImages
from fastdiff.training.loggers import LOGGERS
from fastdiff.training.observers import Observer
from fastdiff.training.training_options import TrainingOptions
from fastdiff.training.validation import hold_out


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add --validation, --validate-every and --log."""
    group = command.add_argument_group("watching")
    group.add_argument(
        "--validation",
        metavar="DATA|SHARE",
        help="images whose loss is measured, at the same times and noise each time: data "
        "like --data, of which the split test is taken if it has splits (as digits have), or a "
        "share such as 0.1 of each class of --data, which is then not trained on",
    )
    group.add_argument(
        "--validate-every",
        type=int,
        default=TrainingOptions().validate_every,
        help="steps between validation losses; 0 for none",
    )
    group.add_argument(
        "--log",
        nargs="+",
        choices=tuple(LOGGERS),
        default=[],
        help="log losses, speed and sample grids there as well, each by a package of that name",
    )


def loggers(args: argparse.Namespace) -> list[Observer]:
    """The loggers of --log; InputError if the package of one is not installed."""
    return [LOGGERS[name]() for name in dict.fromkeys(args.log)]


def share(value: str | None) -> float | None:
    """The share that a value of --validation names, or None if it names images."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def settle(args: argparse.Namespace) -> None:
    """Make the path of --validation absolute, so that any working folder can resume the run."""
    if args.validation is not None and share(args.validation) is None:
        args.validation = data_options.settled(args.validation)


def divided(
    args: argparse.Namespace, images: TrainingImages
) -> tuple[TrainingImages, TrainingImages | None]:
    """The images of --data to train on, and those to validate with.

    Raises:
        InputError: the share is outside (0, 0.5], or the images do not go with each other.
        DataError: images cannot be read, or are too few.
    """
    part = share(args.validation)
    if args.validation is None:
        return images, None
    if part is not None:
        return hold_out(images, part)
    there = argparse.Namespace(**{**vars(args), "data": args.validation, "split": "test"})
    validation = data_options.find(there, args.image_size, grayscale=args.grayscale).read()
    if args.unconditional:
        validation = validation.without_labels()
    if images.classes != validation.classes:
        raise InputError(
            f"--validation has the classes {validation.classes}, --data {images.classes}"
        )
    return images, validation
