"""Compiles the CUDA sources with nvcc, a binary an architecture, and looks at the machine code."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastdiff.kernels.audit.cases import OPERATIONS
from fastdiff.kernels.audit.measured import Measured
from fastdiff.kernels.audit.sass import NotCheckedError, inspect

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "audit"
FLAGS = ("-std=c++20", "-O3", "-cubin", f"-I{ROOT / 'csrc'}")


class Unit(NamedTuple):
    """A source for an architecture."""

    source: Path
    operation: str
    arch: int


def units(operations: Sequence[str] | None, archs: Sequence[int]) -> list[Unit]:
    """What has to be compiled for these operations, or for all.

    Raises:
        NotCheckedError: nvcc or the sources are not here.
    """
    if not SOURCES.is_dir():
        raise NotCheckedError(f"the CUDA sources are not installed: no folder {SOURCES}")
    nvcc()
    found = []
    for source in sorted(SOURCES.glob("*.cu")):
        operation = _operation(source.stem)
        served = {name for name in OPERATIONS if _operation(name) == operation}
        if operations is None or served & set(operations):
            found += [Unit(source, operation, arch) for arch in archs]
    return found


def _operation(stem: str) -> str:
    """The operation whose name a source's begins with, one of several in a source the shortest."""
    stems = {source.stem for source in SOURCES.glob("*.cu")}
    candidates = [name for name in OPERATIONS if name in stems and stem.startswith(name)]
    return max(candidates, key=len, default=stem)


@cache
def nvcc() -> str:
    """The path of nvcc."""
    found = shutil.which("nvcc")
    if found is None:
        raise NotCheckedError("nvcc not found on the PATH: it comes with the CUDA toolkit")
    return found


def compile_all(todo: Sequence[Unit], processes: int) -> Iterator[list[Measured]]:
    """Compile and measure, ``processes`` at a time; the kernels of a unit together."""
    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(measure, todo)


def measure(unit: Unit) -> list[Measured]:
    """Compile a source for an architecture and read what the compiler made of it."""
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
    """The binary, compiled unless one of the same sources and compiler is there already."""
    headers = sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cuh"))
    key = hashlib.sha256(repr((_version(), FLAGS, unit.arch)).encode())
    for path in (unit.source, *headers):
        key.update(path.name.encode() + path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    cubin = CACHE / f"{unit.source.stem}-sm_{unit.arch}-{key.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        for old in CACHE.glob(f"{unit.source.stem}-sm_{unit.arch}-*.cubin"):
            old.unlink()
        part = cubin.with_suffix(".part")
        command = [nvcc(), *FLAGS, f"-arch=sm_{unit.arch}", str(unit.source), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotCheckedError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        part.rename(cubin)
    return cubin.read_bytes()


@cache
def _version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout


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
