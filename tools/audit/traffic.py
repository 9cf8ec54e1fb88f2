"""Counts the bytes that the kernels read and write, and compares them with the least there is.

Triton's kernels are run by its interpreter, in a process of its own where TRITON_INTERPRET=1; a
load or a store counts the elements that its mask lets through. The CUDA kernels are run by the
emulation of CUDA (tools/emulation), where each thread's access counts.

Of an activation every access counts. What else there is, parameters and the workspaces that
launches hand on, counts once a launch: what many blocks read of it comes from the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from tools.audit.cases import COUNTED, OPERATIONS, Case, Source, cases, tensors
from tools.audit.sass import NotCheckedError
from tools.build.common import ROOT, CannotBuildError
from tools.emulation import emulated

SLACK = 1.05  # counted bytes may be that many times the least


@dataclass(frozen=True)
class Traffic:
    """What one case moved, in bytes, and what it may."""

    language: str
    operation: str
    case: str
    read: int
    written: int
    least: int  # of activations, as often as the case says, and of parameters, each once
    unit: int  # S
    launches: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def problem(self) -> str | None:
        """What is wrong with it."""
        if self.moved <= SLACK * self.least:
            return None
        return (
            f"{self.language} {self.operation} {self.case}: moves {self.moved / self.unit:.2f} S, "
            f"the least is {self.least / self.unit:.2f} S"
        )


# Bytes read, bytes written and launches, given where the activations lie: [begin, end) each.
Moved = Callable[[Sequence[tuple[int, int]]], tuple[int, int, int]]


def count(
    language: str,
    case: Case,
    source: Source,
    kernel: Callable[..., Any],
    counter: Callable[[], AbstractContextManager[Moved]],
) -> Traffic:
    """Run one case and count what it moves."""
    torch.manual_seed(0)
    args = case.make(source)
    with counter() as moved:
        results = kernel(*args)
    own = {value.data_ptr(): value for value in tensors((args, results))}
    activations = [value for value in own.values() if value.numel() >= case.activation]
    read, written, launches = moved(
        [(value.data_ptr(), value.data_ptr() + value.nbytes) for value in activations]
    )
    parameters = sum(value.nbytes for value in own.values() if value.numel() < case.activation)
    return Traffic(
        language=language,
        operation=case.operation,
        case=case.name,
        read=read,
        written=written,
        least=case.ideal + parameters + (case.split if launches > 2 else 0),
        unit=case.unit,
        launches=launches,
    )


class _Accesses(NamedTuple):
    """Accesses of one kind and size, by one launch, at these addresses."""

    written: bool
    launch: int
    addresses: Any
    size: int


def _moved(
    accesses: Iterable[_Accesses], activations: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Bytes read and written."""
    import numpy as np

    total = [0, 0]
    others: dict[tuple[bool, int, int], list[Any]] = {}
    for written, launch, addresses, size in accesses:
        inside = np.zeros(addresses.shape, bool)
        for begin, end in activations:
            inside |= (addresses >= begin) & (addresses < end)
        total[written] += int(inside.sum()) * size
        others.setdefault((written, launch, size), []).append(addresses[~inside])
    for (written, _, size), found in others.items():
        total[written] += np.unique(np.concatenate(found)).size * size
    return total[0], total[1]


@contextmanager
def interpreted() -> Iterator[Moved]:
    """Counts what Triton's interpreter reads, writes and launches within the block."""
    import numpy as np
    from triton.runtime import interpreter

    accesses: list[_Accesses] = []
    launches = 0
    builder = type(interpreter.interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store
    call = interpreter.GridExecutor.__call__

    def note(written: bool, pointers: Any, mask: Any) -> None:
        named = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        accesses.append(_Accesses(written, launches, np.unique(named), size))

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        note(False, pointers, mask)
        return load(self, pointers, mask, *rest, **more)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(True, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def noted_call(self: Any, *args: Any, **more: Any) -> Any:
        nonlocal launches
        launches += 1
        return call(self, *args, **more)

    builder.create_masked_load, builder.create_masked_store = noted_load, noted_store
    interpreter.GridExecutor.__call__ = noted_call
    try:
        yield lambda activations: (*_moved(accesses, activations), launches)
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = call


def cuda_traffic(operations: Sequence[str] | None) -> Iterator[Traffic]:
    """Count every case in the emulation of CUDA.

    Raises:
        NotCheckedError: it cannot be built here.
    """
    try:
        kernels = emulated.load()
    except CannotBuildError as reason:
        raise NotCheckedError(f"the emulation cannot be built: {reason}") from None

    @contextmanager
    def counter() -> Iterator[Moved]:
        with emulated.traffic(trace=True) as found:
            yield lambda activations: (
                *_moved(_by_kind(found.accesses), activations),
                found.launches,
            )

    for case, source in cases(COUNTED, operations, "cpu"):
        yield count("cuda", case, source, getattr(kernels, case.operation), counter)


def _by_kind(accesses: Any) -> Iterator[_Accesses]:
    """The accesses of a trace, those of one kind together."""
    import numpy as np

    kinds, number = np.unique(accesses[["written", "launch", "bytes"]], return_inverse=True)
    for index, (written, launch, size) in enumerate(kinds.tolist()):
        yield _Accesses(bool(written), launch, accesses["address"][number == index], size)


def triton_traffic(operations: Sequence[str] | None, processes: int) -> Iterator[Traffic]:
    """Count every case, in processes that interpret: one an operation, ``processes`` at a time."""
    with ThreadPoolExecutor(processes) as pool:
        for found in pool.map(_interpreted_operation, operations or OPERATIONS):
            yield from found


def _interpreted_operation(operation: str) -> list[Traffic]:
    command = [sys.executable, "-m", "tools.audit.traffic", operation]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise NotCheckedError(f"the interpreter failed with {operation} (see above)")
    return [Traffic(**json.loads(line)) for line in done.stdout.splitlines()]


def _main() -> None:
    from fastdiff.ops.gpu import gpu_kernel

    for case, source in cases(COUNTED, sys.argv[1:], "cpu"):
        kernel = gpu_kernel(case.operation, "triton")
        print(json.dumps(asdict(count("triton", case, source, kernel, interpreted))), flush=True)


if __name__ == "__main__":
    _main()
