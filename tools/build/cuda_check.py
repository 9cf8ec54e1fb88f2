"""``python -m tools.build.cuda_check``: compile the CUDA part for every architecture and look.

Without a GPU and with any torch, also one for CPUs, whose wheel has the headers: the kernels must
not spill registers, and what the linked extension leaves undefined must be what libraries provide,
or c10's and ATen's CUDA part where this torch lacks it. TORCH_CUDA_ARCH_LIST, where it is set, says
for which architectures instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tools.build.common import (
    CSRC,
    ROOT,
    CannotBuildError,
    compiler,
    folder_for,
    run_ninja,
    torch_facts,
    torch_libraries,
)
from tools.build.cuda import DEFAULT, build_file, chosen_architectures, toolkit

PTXAS = re.compile(
    r"Compiling entry function '(?P<kernel>[^']+)' for '(?P<arch>sm_\w+)'"
    r"|(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r"|Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+) bytes smem)?"
)
TORCH_CUDA = re.compile(r"\b(c10::cuda|at::cuda)::")
PYTHON = re.compile(r"_?Py[A-Z_]")  # the interpreter provides these


@dataclass
class Usage:
    """The most that any kernel of a file uses on one architecture, in registers and bytes."""

    kernels: int = 0
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0


def run() -> bool:
    """Compile, print a table, and whether everything is as it should be; True without nvcc."""
    try:
        nvcc = toolkit()
    except CannotBuildError as reason:
        print(f"cuda_check: skipped: {reason}")
        return True
    try:
        chosen = chosen_architectures()
        print(f"cuda_check: CUDA {nvcc.version}, torch {torch_facts()['version']}")
        folder, library = compiled(chosen)
    except CannotBuildError as reason:
        print(f"cuda_check: failed: {reason}", file=sys.stderr)
        return False
    faults = []
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        faults = [f"compute capability {c} is unknown to nvcc" for c in DEFAULT[len(chosen) :]]
    faults += spills(folder)
    faults += [f"nothing provides the symbol {name}" for name in missing_symbols(library)]
    for fault in faults:
        print(f"cuda_check: failed: {fault}", file=sys.stderr)
    if not faults:
        print(f"cuda_check: passed: {library.relative_to(ROOT)}")
    return not faults


def compiled(chosen: list, *, quiet: bool = False) -> tuple[Path, Path]:
    """The build folder, with what ptxas said beside each object, and the linked extension."""
    folder = folder_for("cuda-check")
    library = folder / "_cuda.so"
    lines = build_file(
        library,
        chosen,
        link=f"{torch_libraries()} -ltorch_cpu -lc10 -lcudart",
        more_nvcc="-Xptxas -v",
        # The CPU wheel lacks one generated header, which this does without.
        more_cxx="-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
    )
    logged = "> $out.log 2>&1 || (cat $out.log; exit 1)"
    lines = [
        f"{line} {logged}" if line.startswith("  command") and "-Xptxas -v" in line else line
        for line in lines
    ]
    run_ninja(folder, lines, quiet=quiet)
    return folder, library


def spills(folder: Path) -> list[str]:
    """Print what each file's kernels use; the kernels that spill registers."""
    faults = []
    print(
        f"{'file':<30} {'arch':<7} {'kernels':>7} {'registers':>9} {'shared':>7} {'stack':>6} "
        f"{'spills':>6}"
    )
    for log in sorted(folder.glob("*.cu.o.log")):
        name = log.name.removesuffix(".o.log")
        used: dict[str, Usage] = defaultdict(Usage)
        kernel = arch = ""
        for match in PTXAS.finditer(log.read_text()):
            if match["kernel"]:
                kernel, arch = match["kernel"], match["arch"]
                used[arch].kernels += 1
            elif match["stack"]:
                spilled = int(match["stores"]) + int(match["loads"])
                used[arch].stack = max(used[arch].stack, int(match["stack"]))
                used[arch].spills += spilled
                if spilled:
                    faults.append(f"{name}: {spilled} bytes spilled on {arch} by {kernel}")
            else:
                used[arch].registers = max(used[arch].registers, int(match["registers"]))
                used[arch].shared = max(used[arch].shared, int(match["shared"] or 0))
        if not used and "__global__" in (CSRC / "cuda" / name).read_text():
            faults.append(f"{name}: ptxas said nothing of its kernels")
        for arch, most in used.items():
            print(
                f"{name:<30} {arch:<7} {most.kernels:>7} {most.registers:>9} {most.shared:>7} "
                f"{most.stack:>6} {most.spills:>6}"
            )
    return faults


def missing_symbols(library: Path) -> list[str]:
    """Undefined symbols of the extension that no library and no CUDA torch provides."""
    named = ["libstdc++.so.6", "libc.so.6", "libm.so.6", "libgcc_s.so.1"]
    places = [
        subprocess.run(
            [*compiler().split(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in named
    ]
    loader = sorted(Path(places[1]).parent.glob("ld-*.so*"))
    torch = [path for place in torch_facts()["lib"] for path in sorted(Path(place).glob("lib*.so"))]
    runtime = [
        path
        for place in toolkit().libraries
        for path in Path(place).glob("libcudart.so")
        if "stubs" not in place
    ]
    provided: set[str] = set()
    for path in [*map(Path, places), *loader, *torch, *runtime]:
        provided |= symbols(path, "--defined-only")
    open_ends = sorted(symbols(library, "--undefined-only") - provided)
    readable = subprocess.run(
        ["c++filt"], input="\n".join(open_ends), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [name for name in readable if not TORCH_CUDA.search(name) and not PYTHON.match(name)]


def symbols(path: Path, which: str) -> set[str]:
    """The dynamic symbols of a library that it must have: weak ones may stay undefined."""
    lines = subprocess.run(
        ["nm", "-D", which, str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    parts = [line.split() for line in lines]
    return {part[-1].split("@")[0] for part in parts if len(part) > 1 and part[-2] not in "wv"}


if __name__ == "__main__":
    sys.exit(0 if run() else 1)
