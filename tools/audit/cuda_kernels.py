"""Looks at the machine code that nvcc makes of the CUDA sources, in the objects of cuda_check."""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tools.audit.cases import OPERATIONS
from tools.audit.measured import Measured
from tools.audit.sass import NotCheckedError, inspect, run, tool
from tools.build import cuda, cuda_check
from tools.build.common import CSRC, CannotBuildError


class Unit(NamedTuple):
    """An object file, and an architecture of those that it holds machine code for."""

    object: Path
    operation: str
    arch: int


def units(operations: Sequence[str] | None, archs: Sequence[int]) -> list[Unit]:
    """The objects of these operations, or of all, compiled unless they are there already.

    Raises:
        NotCheckedError: nvcc is not here, or the sources do not compile.
    """
    try:
        chosen = cuda.chosen_architectures()
        missing = sorted({*map(str, archs)} - {arch.number for arch in chosen})
        if missing:
            raise NotCheckedError(
                f"not compiled for sm_{', sm_'.join(missing)}, which nvcc or TORCH_CUDA_ARCH_LIST "
                "leaves out"
            )
        folder, _ = cuda_check.compiled(chosen, quiet=True)
    except CannotBuildError as reason:
        raise NotCheckedError(str(reason)) from None
    found = []
    for source in sorted(CSRC.glob("cuda/*.cu")):
        operation = _operation(source.stem)
        served = {name for name in OPERATIONS if _operation(name) == operation}
        if operations is None or served & set(operations):
            found += [Unit(folder / f"{source.name}.o", operation, arch) for arch in archs]
    return found


def _operation(stem: str) -> str:
    """The operation whose name a source's begins with, one of several in a source the shortest."""
    stems = {source.stem for source in CSRC.glob("cuda/*.cu")}
    candidates = [name for name in OPERATIONS if name in stems and stem.startswith(name)]
    return max(candidates, key=len, default=stem)


def measure_all(todo: Sequence[Unit], processes: int) -> Iterator[list[Measured]]:
    """Measure, ``processes`` at a time; the kernels of a unit together."""
    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(measure, todo)


def measure(unit: Unit) -> list[Measured]:
    """Read what the compiler made of an object's kernels for an architecture."""
    found = []
    for code in inspect(_cubin(unit), unit.arch):
        kernel, configuration = _names(code.name)
        found.append(
            Measured(
                language="cuda",
                operation=unit.operation,
                kernel=kernel,
                arch=unit.arch,
                configuration=configuration,
                threads=code.threads,
                registers=code.registers,
                shared=code.shared,
                stack=code.stack,
                spills=code.spills,
                load=max(code.loads, default=0),
                store=max(code.stores, default=0),
            )
        )
    return found


def _cubin(unit: Unit) -> bytes:
    """The machine code of an object for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, path = f"sm_{unit.arch}.cubin", str(unit.object.resolve())
        run(tool("cuobjdump"), "--extract-elf", wanted, path, folder=folder)
        (cubin,) = Path(folder).glob(f"*{wanted}")
        return cubin.read_bytes()


def _names(mangled: str) -> tuple[str, str]:
    """A kernel's name and its template's arguments, both without namespaces."""
    text = _demangled(mangled)
    for noise in ("(anonymous namespace)::", "fastdiff::cuda::", "void "):
        text = text.replace(noise, "")
    text = re.sub(r"\((?:int|bool|long)\)", "", text)  # of a value among the arguments
    found = re.match(r"(?:\w+::)*(\w+)(?:<(.*)>)?\(", text)
    return (found[1], found[2] or "") if found else (mangled, "")


def _demangled(mangled: str) -> str:
    try:
        demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    except (OSError, AttributeError):
        return mangled
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = demangle(mangled.encode(), None, None, ctypes.byref(status))
    if not text:
        return mangled
    found = ctypes.cast(text, ctypes.c_char_p).value or b""
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    return found.decode()
