"""Write a checkpoint without its training state, for sharing.

The folder holds the averaged model in diffusers' format, and fastdiff.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.cli.parsing import add_checkpoint_argument

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff export``."""
    add_checkpoint_argument(command)
    command.add_argument("--out", type=Path, required=True, help="the folder to create")
    command.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the weights in the file"
    )


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Export, print what was written, and return the exit code."""
    source = checkpoint.load(args.checkpoint)
    checkpoint.export(source, args.out, DTYPES[args.dtype])
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: step {source.step}, {args.dtype}, {size / 1e6:.2f} MB")
    return 0
