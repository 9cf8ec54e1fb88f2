"""Counts the bytes that the kernels read and write, and compares them with the least there is.

Triton's kernels are run by its interpreter, in a process of its own where TRITON_INTERPRET=1. A
load or a store counts the elements that its mask lets through: of an activation each time, of
anything else once a launch, for what many programs read of parameters comes from the cache.

The CUDA kernels are run by the tests' emulation (tests/emulation), where each thread's access
counts by itself. There only those 128 bits wide are counted, which is how activations move.
Channels-last, parameters of channels do too, once for each vector of the activation; they come from
the cache as well, and Case.cached allows for them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff.kernels.audit.cases import COUNTED, Case, Source, cases, tensors
from fastdiff.kernels.audit.sass import NotCheckedError

EMULATION = Path(__file__).resolve().parents[2] / "tests" / "emulation"
SLACK = 1.05  # counted bytes may be that many times the least


@dataclass(frozen=True)
class Traffic:
    """What one case moved, in bytes, and what it may."""

    language: str
    operation: str
    case: str
    read: int
    written: int
    least: int  # of activations and parameters, each once, and of what the cache serves
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
        least=case.ideal + parameters + _more(language, case, launches),
        unit=case.unit,
        launches=launches,
    )


def _more(language: str, case: Case, launches: int) -> int:
    """What a case may move beyond its ideal, for the launches that it took."""
    on_chip = launches <= 2 and case.split
    return (0 if on_chip or language != "cuda" else case.cached) + (
        case.split if launches > 2 else 0
    )


@contextmanager
def interpreted() -> Iterator[Moved]:
    """Counts what Triton's interpreter reads, writes and launches within the block."""
    import numpy as np
    from triton.runtime import interpreter

    accesses: list[tuple[str, int, Any, int]] = []
    launches = 0
    builder = type(interpreter.interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store
    call = interpreter.GridExecutor.__call__

    def note(kind: str, pointers: Any, mask: Any) -> None:
        named = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        accesses.append((kind, launches, np.unique(named), size))

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        note("read", pointers, mask)
        return load(self, pointers, mask, *rest, **more)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("written", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def noted_call(self: Any, *args: Any, **more: Any) -> Any:
        nonlocal launches
        launches += 1
        return call(self, *args, **more)

    def moved(activations: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
        total = {"read": 0, "written": 0}
        once: dict[tuple[str, int, int], list[Any]] = {}
        for kind, launch, addresses, size in accesses:
            inside = np.zeros(addresses.shape, bool)
            for begin, end in activations:
                inside |= (addresses >= begin) & (addresses < end)
            total[kind] += int(inside.sum()) * size
            once.setdefault((kind, launch, size), []).append(addresses[~inside])
        for (kind, _, size), addresses in once.items():
            total[kind] += np.unique(np.concatenate(addresses)).size * size
        return total["read"], total["written"], launches

    builder.create_masked_load, builder.create_masked_store = noted_load, noted_store
    interpreter.GridExecutor.__call__ = noted_call
    try:
        yield moved
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = call


def cuda_traffic(operations: Sequence[str] | None) -> Iterator[Traffic]:
    """Count every case in the tests' emulation of CUDA.

    Raises:
        NotCheckedError: it is not here, or cannot be built.
    """
    if not (EMULATION / "emulated.py").exists():
        raise NotCheckedError(f"the emulation is not installed: no folder {EMULATION}")
    if not sys.platform.startswith("linux") or importlib.util.find_spec("pytest") is None:
        raise NotCheckedError("the emulation needs Linux and pytest")
    sys.path.insert(0, str(EMULATION))
    import emulated

    try:
        kernels = emulated.load()
    except emulated.tools.CannotBuildError as reason:
        raise NotCheckedError(f"the emulation cannot be built: {reason}") from None

    @contextmanager
    def counter() -> Iterator[Moved]:
        wide = max(emulated.WIDTHS)
        with emulated.traffic() as found:
            yield lambda _: (
                found.reads.get(wide, 0) * wide,
                found.writes.get(wide, 0) * wide,
                found.launches,
            )

    for case, source in cases(COUNTED, operations, "cpu"):
        yield count("cuda", case, source, getattr(kernels, case.operation), counter)


def triton_traffic(operations: Sequence[str] | None) -> Iterator[Traffic]:
    """Count every case, in a process that interprets."""
    command = [sys.executable, "-m", "fastdiff.kernels.audit.traffic", *(operations or ())]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            yield Traffic(**json.loads(line))
    if child.returncode:
        raise NotCheckedError("the interpreter failed (see above)")


def _main() -> None:
    from fastdiff.ops.gpu import gpu_kernel

    for case, source in cases(COUNTED, sys.argv[1:] or None, "cpu"):
        kernel = gpu_kernel(case.operation, "triton")
        print(json.dumps(asdict(count("triton", case, source, kernel, interpreted))), flush=True)


if __name__ == "__main__":
    _main()
