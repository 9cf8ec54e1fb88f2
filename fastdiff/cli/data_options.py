"""The options that say what images to train on and how they are read."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from fastdiff.common.errors import InputError
from fastdiff.data import datasets
from fastdiff.data.image_file import CROPS, FILTERS, Reading
from fastdiff.data.image_loading import load
from fastdiff.data.image_source import ImageSource
from fastdiff.data.recognition import find_source, is_local
from fastdiff.data.table_rows import TableRows
from fastdiff.data.training_images import TrainingImages

DIGITS = "digits"  # the value of --data for scikit-learn's digits
MOST_WORKERS = 8  # processes that read, unless more are asked for
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

HELP = (
    "digits (scikit-learn's); a folder of images, with a sub-folder for each class; tar shards; "
    "parquet files; hf:NAME of the Hugging Face Hub; CIFAR's or MNIST's own files; or latents"
)


def add_source_arguments(group: argparse._ActionsContainer) -> None:
    """Add what is trained on and how it is read, but not --data and :func:`add_arguments`'s."""
    group.add_argument(
        "--split", default="train", help="of data that have splits: train, test or as they name it"
    )
    group.add_argument(
        "--crop",
        choices=CROPS,
        default="center",
        help="the square of each image to train on: the one in its middle, or one at a random "
        "place, drawn anew each time",
    )
    group.add_argument(
        "--latent-scale", type=float, default=1.0, help="factor of latents, for example 0.18215"
    )
    add_reading_arguments(group)


def add_reading_arguments(group: argparse._ActionsContainer) -> None:
    """Add how images of any data are read: --resize, the columns, --cache and --workers."""
    group.add_argument(
        "--resize", choices=tuple(FILTERS), default="bicubic", help="filter that brings to size"
    )
    group.add_argument("--image-column", help="of a table: the column of the images")
    group.add_argument("--label-column", help="of a table: the column of the labels")
    group.add_argument(
        "--cache",
        type=byte_count,
        default=datasets.CACHE,
        metavar="BYTES",
        help="memory for images, for example 16G; those that do not fit are read while training",
    )
    group.add_argument(
        "--workers",
        type=_whole,
        default=_workers(),
        help="processes that read images; 0 reads them between the steps",
    )


def add_arguments(group: argparse._ActionsContainer) -> None:
    """Add --value-range and --skip-bad."""
    group.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("BLACK", "WHITE"),
        help="the values that are black and white in files of more than 8 bits a value: for "
        "example 0 4095 for 12-bit images in files of 16 bits",
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="do without images that cannot be read, and say how many",
    )


@dataclass(frozen=True)
class Found:
    """The images of --data, found but not read.

    Attributes:
        source: where they are; None for the digits.
        reading: how they become pixels.
        args: the parsed arguments.
    """

    source: ImageSource | None
    reading: Reading
    args: argparse.Namespace

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty without labels."""
        return tuple("0123456789") if self.source is None else self.source.classes

    @property
    def channels(self) -> int:
        """The channels of the images."""
        return 1 if self.source is None else self.source.channels(self.reading)

    def check_flip(self, flip: bool) -> None:
        """InputError if images are to be mirrored that have no mirror image."""
        if flip and self.source is None:
            raise InputError("--flip is not for digits: a mirrored digit is no digit")

    def read(self, *, flip: bool = False) -> TrainingImages:
        """The images, in memory or read while training.

        Raises:
            DataError: they cannot be read, or the options do not suit them.
        """
        self.check_flip(flip)
        if self.source is None:
            return datasets.digits(self.args.split, self.reading.size)
        args = self.args
        return load(
            self.source, self.reading, cache=args.cache, workers=args.workers, flip=flip,
            skip_bad=args.skip_bad, scale=args.latent_scale,
        )  # fmt: skip


def find(args: argparse.Namespace, size: int, *, grayscale: bool = False) -> Found:
    """Find the images of --data.

    Args:
        args: the parsed arguments, with --data and those that this file adds.
        size: height and width of the result.
        grayscale: read one channel instead of three.

    Raises:
        DataError: there are none, or they are damaged.
        InputError: options that are for other data.
    """
    columns = args.image_column is not None or args.label_column is not None
    value_range = None if args.value_range is None else tuple(args.value_range)
    reading = Reading(size, grayscale, value_range, args.crop, args.resize)
    if args.data == DIGITS:
        if columns or value_range is not None or args.latent_scale != 1 or args.crop != "center":
            raise InputError(
                "--crop, --value-range, --latent-scale, --image-column and --label-column are not "
                "for digits"
            )
        return Found(None, reading, args)
    source = find_source(
        args.data, split=args.split, image_column=args.image_column, label_column=args.label_column
    )
    if columns and not isinstance(source, TableRows):
        raise InputError(
            f"--image-column and --label-column are for tables, and {args.data} is none"
        )
    source.check(reading)
    return Found(source, reading, args)


def settled(data: str) -> str:
    """The value of --data, a path made absolute, so that any working folder can resume the run."""
    return str(Path(data).absolute()) if data != DIGITS and is_local(data) else data


def is_gone(data: str) -> bool:
    """Whether a value of --data is the path of something that is no longer there."""
    return data != DIGITS and is_local(data) and "{" not in data and not Path(data).exists()


def byte_count(text: str) -> int:
    """A number of bytes, such as 2G, 500M or 1000000, for argparse; units are powers of 1024."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in UNITS else ""
    try:
        count = int(float(number.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        count = -1
    if not 0 <= count < 2**63:
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 2G, got {text!r}")
    return count


def _whole(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**10:
        raise argparse.ArgumentTypeError(f"must lie in 0..1023, got {value}")
    return value


def _workers() -> int:
    """One for each processor that this process may use, shared among the processes of a machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MOST_WORKERS, (usable or 1) // max(1, here)))
