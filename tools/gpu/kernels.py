"""Runs one case of each GPU kernel, for a tool that watches: ``python -m tools.gpu.kernels``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from fastdiff.ops.backend import missing
from fastdiff.ops.gpu import gpu_kernel
from tools.audit.cases import COMPILED, COUNTED, OPERATIONS, cases


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kernels; an error in one is the program's."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.kernels", description=__doc__)
    parser.add_argument("size", choices=("small", "large"), help="of feature maps and images")
    options = parser.parse_args(argv)
    shapes = COUNTED if options.size == "small" else COMPILED
    without = {backend: missing()[backend] for backend in ("triton", "cuda")}
    for backend, reason in without.items():
        if reason is not None:
            print(f"{backend} cannot run here: {reason}", flush=True)
            continue
        for operation in OPERATIONS:
            case, source = list(cases(shapes, [operation], "cuda"))[-1]
            kernel, arguments = gpu_kernel(operation, backend), case.make(source)
            kernel(*arguments)  # compiled now, and not watched
            with torch.cuda.profiler.profile():  # what Nsight Compute is to look at
                kernel(*arguments)
                torch.cuda.synchronize()
            print(f"{backend} {operation} {case.name}", flush=True)
    return 2 if all(without.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
