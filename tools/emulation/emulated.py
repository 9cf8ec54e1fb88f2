"""Builds the CUDA sources for the host and loads them: the kernels without a GPU, for tests.

``load()`` gives the operations of csrc/cuda/bindings for CPU tensors, ``traffic()`` what their
kernels read and write, ``build_driver()`` a program that runs them under a sanitizer. Everything
is built by ninja in build/, once.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.build import common

HERE = Path(__file__).resolve().parent
SHARED = HERE / "shared.ld"
WIDTHS = (1, 2, 4, 8, 16)  # of an access, in bytes
ACCESS = np.dtype(
    [("address", "u8"), ("bytes", "u4"), ("written", "u4"), ("launch", "u4"), ("unused", "u4")]
)
SANITIZERS = {
    "none": "",
    "thread": "-DFASTDIFF_EMULATE_THREADS -fsanitize=thread",
    # A null pointer stops the address sanitizer too; GCC takes half as long again to look for it.
    "address": "-DFASTDIFF_EMULATE_THREADS -fsanitize=address,undefined "
    "-fno-sanitize=null,object-size -fno-sanitize-recover=all",
}


@cache
def load() -> Any:
    """``torch.ops.fastdiff_emulated``: the CUDA operations by name, for CPU tensors."""
    torch.ops.load_library(str(_library()))
    return torch.ops.fastdiff_emulated


@dataclass
class Traffic:
    """Accesses to global memory by their width in bytes, and launches.

    ``accesses`` are those of a trace, each by itself, of dtype ACCESS.
    """

    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    launches: int = 0
    accesses: np.ndarray = field(default_factory=lambda: np.empty(0, ACCESS))

    @property
    def bytes_read(self) -> int:
        """Bytes that all reads together moved."""
        return sum(width * count for width, count in self.reads.items())

    @property
    def bytes_written(self) -> int:
        """Bytes that all writes together moved."""
        return sum(width * count for width, count in self.writes.items())


@contextmanager
def traffic(trace: bool = False) -> Iterator[Traffic]:
    """Counts what emulated kernels do within the block; complete when it ends."""
    load()
    library = ctypes.CDLL(str(_library()))
    library.fastdiff_emulation_accesses.restype = ctypes.c_void_p
    found = Traffic()
    library.fastdiff_emulation_reset(trace)
    try:
        yield found
    finally:
        counts = (ctypes.c_uint64 * 11)()
        library.fastdiff_emulation_traffic(counts)
        found.reads = {w: n for w, n in zip(WIDTHS, counts[:5], strict=True) if n}
        found.writes = {w: n for w, n in zip(WIDTHS, counts[5:10], strict=True) if n}
        found.launches = counts[10]
        traced = ctypes.c_uint64()
        first = library.fastdiff_emulation_accesses(ctypes.byref(traced))
        if traced.value:
            found.accesses = np.frombuffer(
                ctypes.string_at(first, traced.value * ACCESS.itemsize), ACCESS
            )
        library.fastdiff_emulation_reset(False)


def build_driver(
    sanitizer: str, *, source: Path = HERE / "driver.cpp", changed: Path | None = None
) -> Path:
    """A program of ``source`` and the kernels, with a sanitizer in it.

    Args:
        sanitizer: ``none``, ``thread`` or ``address`` (with that for undefined behaviour).
        source: the program's own source. A .cu file stands alone, without the kernels.
        changed: a changed copy of a kernel's file, to be used in its place. The program is built
            beside it, from the other objects of the program without it.
    """
    name = f"{source.stem}-{sanitizer}"
    folder = common.BUILD / f"emulation-{name}"
    # -g1: lines for a sanitizer's report. -fno-tree-sra: GCC 12 fails with -fsanitize=thread.
    flags = f"{SANITIZERS[sanitizer]} -g1 -fno-omit-frame-pointer -fno-tree-sra"
    rules = _rules(flags, "$cxx $in -o $out")
    sources = [source, HERE / "emulation.cpp"]
    if source.suffix != ".cu":
        sources += _kernels()
    program = _build(rules, sources, folder / name)
    if changed is None:
        return program
    others = [folder / _object(path) for path in sources if path.name != changed.name]
    return _build(rules, [changed], changed.parent / name / "changed", others)


@cache
def _library() -> Path:
    folder = common.folder_for("emulation")
    link = f"$cxx -shared $in -o $out {common.torch_libraries()} -ltorch_cpu -lc10"
    with_torch = sorted(common.CSRC.glob("cuda/bindings/*.cpp"))
    sources = [HERE / "emulation.cpp", *_kernels()]
    output = folder / "fastdiff_emulated.so"
    return _build(_rules("", link), sources, output, with_torch=with_torch)


def _kernels() -> list[Path]:
    return sorted((common.CSRC / "cuda").glob("*.cu"))


def _rules(flags: str, link: str) -> list[str]:
    return [
        f"cxx = {common.compiler()}",
        f"flags = {common.COMMON_FLAGS} -O1 -DFASTDIFF_EMULATE -I{HERE} -I{common.CSRC} {flags}",
        *common.COMPILE_RULE,
        "rule link",
        f"  command = {link} {flags} -pthread -Wl,-T,{SHARED}",
        "  description = link $out",
    ]


def _object(source: Path) -> str:
    """The object's name, by which shared.ld knows those of kernels."""
    return f"{source.stem}.cu.o" if source.suffix == ".cu" else f"{source.stem}.o"


def _build(
    rules: list[str],
    sources: list[Path],
    output: Path,
    others: Sequence[Path] = (),
    with_torch: Sequence[Path] = (),
) -> Path:
    """Compile the sources and those that include PyTorch, and link them with the other objects."""
    if platform.system() != "Linux":
        raise common.CannotBuildError("the emulation is built with Linux's tools")
    lines = list(rules)
    for source in sources:
        flags = "-x c++" if source.suffix == ".cu" else ""
        lines += [f"build {_object(source)}: compile {source}", f"  more = {flags}"]
    if with_torch:
        bindings = [_object(source) for source in with_torch]
        header, flags = common.CSRC / "precompiled.h", common.torch_flags()
        lines += common.compile_with(header, with_torch, bindings, "bindings", flags)
    objects = " ".join([*map(_object, [*sources, *with_torch]), *map(str, others)])
    lines.append(f"build {output}: link {objects} | {SHARED}")
    common.run_ninja(output.parent, lines, quiet=True)
    return output
