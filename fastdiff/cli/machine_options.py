"""The options that say where to compute: backend, threads and device."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdiff.cli.parsing import positive
from fastdiff.common.errors import InputError
from fastdiff.common.world import local_rank
from fastdiff.ops.backend import NAMES, backend, describe, on_cuda


def add_arguments(command: argparse._ActionsContainer) -> None:
    """Add --backend, --threads and --device."""
    command.add_argument(
        "--backend", choices=NAMES, default="auto", help="of fastdiff's operations"
    )
    command.add_argument("--threads", type=positive, help="CPU threads (default: as torch chooses)")
    command.add_argument("--device", default="cpu", help="where the model runs: cpu or cuda")


@contextmanager
def machine(args: argparse.Namespace) -> Iterator[torch.device]:
    """For a ``with`` block, apply --backend and --threads; gives the device of --device.

    Each process that torchrun started on a machine has a GPU of its own.

    Raises:
        InputError: a backend or device that this machine cannot use.
    """
    try:
        device = torch.device(args.device)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", local_rank())
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        text = str(error).split("\n")[0]
        raise InputError(f"--device {args.device} cannot be used: {text}") from None
    try:
        chosen = backend(args.backend)
    except RuntimeError as error:
        raise InputError(str(error)) from None
    threads = torch.get_num_threads()
    try:
        with chosen:
            torch.set_num_threads(args.threads or threads)
            yield device
    finally:
        torch.set_num_threads(threads)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Backend, instruction set and threads of fastdiff's operations on ``device``."""
    if device.type == "cpu":
        return describe()
    name = (on_cuda() if device.type == "cuda" else None) or "reference"
    return {"backend": name, "isa": device.type, "threads": torch.get_num_threads()}


def process_seconds() -> float:
    """Seconds since this process began; 0 on systems other than Linux."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError):  # not Linux
        return 0.0
