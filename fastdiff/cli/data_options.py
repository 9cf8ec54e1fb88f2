"""The options that say how the image files of a folder are read."""

from __future__ import annotations

import argparse
from typing import Any

from fastdiff.data import datasets


def add_arguments(group: argparse._ActionsContainer) -> None:
    """Add --value-range and --skip-bad."""
    group.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("BLACK", "WHITE"),
        help="the values that are black and white in a folder's files of more than 8 bits a value: "
        "for example 0 4095 for 12-bit images in files of 16 bits",
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="skip the files of a folder that cannot be read, and say how many",
    )


def read_folder(args: argparse.Namespace, size: int, **options: Any) -> datasets.ImageSet:
    """The images of the folder --data, by the options of :func:`add_arguments`.

    Args:
        args: the parsed arguments.
        size: height and width of the result.
        **options: of :func:`fastdiff.data.folder`.

    Raises:
        DataError: as :func:`fastdiff.data.folder` does.
    """
    value_range = None if args.value_range is None else tuple(args.value_range)
    return datasets.folder(
        args.data, size, value_range=value_range, skip_bad=args.skip_bad, **options
    )
