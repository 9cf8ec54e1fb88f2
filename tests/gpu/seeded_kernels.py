"""Kernels with defects that the audit has to find, and a program that audits them.

``python seeded_kernels.py`` prints what the audit says of them as JSON; with TRITON_INTERPRET=1
it prints what they move. Run by test_audit.py in a process of its own, since Triton either compiles
or interprets for as long as a process lives.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import torch
import triton
import triton.language as tl

from fastdiff.kernels.launch import launch
from fastdiff.ops import gpu
from tools.audit import __main__ as audit
from tools.audit import cases, traffic

SHAPE = (2, 16, 32, 32)


@triton.jit
def _double(x, out, n, SIZE: tl.constexpr):
    offset = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + offset, tl.load(x + offset, offset < n) * 2, offset < n)


@triton.jit
def _double_by_ones(x, out, n, SIZE: tl.constexpr):
    offset = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + offset, offset < n) * 2
    tl.store(out + (offset ^ 1), value, offset < n)  # neighbours change places


@triton.jit
def _double_read_twice(x, out, n, SIZE: tl.constexpr):
    offset = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    first = tl.load(x + offset, offset < n)
    tl.debug_barrier()
    tl.store(out + offset, first + tl.load(x + offset, offset < n), offset < n)


@triton.jit
def _fill(seed, n, SIZE: tl.constexpr):
    tl.store(seed + tl.arange(0, SIZE), 0, tl.arange(0, SIZE) < n)


def _launcher(kernel, **options):
    def run(x):
        out = torch.empty_like(x)
        grid = (triton.cdiv(x.numel(), options["SIZE"]),)
        launch(kernel, grid, x, out, x.numel(), **options)
        return out

    return run


def touches_nothing(x):
    launch(_fill, (1,), x.new_empty(16), 16, SIZE=16)
    return torch.empty_like(x)


LAUNCHERS = {
    "sound": _launcher(_double, SIZE=2048, num_warps=4),
    "scalar_store": _launcher(_double_by_ones, SIZE=2048, num_warps=4),
    "spills": _launcher(_double, SIZE=32768, num_warps=1, maxnreg=32),
    "reads_twice": _launcher(_double_read_twice, SIZE=2048, num_warps=4),
    "touches_nothing": touches_nothing,
}


def _cases(name):
    def of_operation(shapes, kind):
        if kind == (torch.float32, False):
            yield cases._case(name, SHAPE, kind, lambda source: (source.image(*SHAPE),), 2)

    return of_operation


def main():
    cases.OPERATIONS.clear()
    cases.OPERATIONS.update({name: _cases(name) for name in LAUNCHERS})
    gpu.gpu_kernel = lambda name, where: LAUNCHERS[name]
    if os.environ.get("TRITON_INTERPRET") != "1":
        options = ["--archs", "90", "--no-cuda", "--no-bytes", "--json", "--jobs", "1"]
        return audit.main(options)
    found = [
        traffic.count("triton", case, source, LAUNCHERS[case.operation], traffic.interpreted)
        for case, source in cases.cases(cases.COUNTED._replace(dtypes=[torch.float32]), None, "cpu")
        if case.operation in ("sound", "reads_twice")
    ]
    print(
        json.dumps(
            {one.operation: {**dataclasses.asdict(one), "problem": one.problem} for one in found}
        )
    )
    return 0


if __name__ == "__main__":
    import seeded_kernels  # by its name, so that the audit's processes find the kernels

    sys.exit(seeded_kernels.main())
