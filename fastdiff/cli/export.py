"""Write a checkpoint without its training state, for sharing.

The folder holds one average of the model in diffusers' format, and fastdiff.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastdiff.checkpoints import checkpoint
from fastdiff.cli.parsing import (
    DTYPES,
    add_checkpoint_argument,
    add_dtype_argument,
    add_weights_argument,
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff export``."""
    add_checkpoint_argument(command)
    add_weights_argument(command)
    command.add_argument("--out", type=Path, required=True, help="the folder to create")
    add_dtype_argument(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Export, print what was written, and return the exit code."""
    source = checkpoint.load(args.checkpoint, args.weights)
    checkpoint.export(source, args.out, DTYPES[args.dtype])
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: step {source.step}, {args.dtype}, {size / 1e6:.2f} MB")
    return 0
