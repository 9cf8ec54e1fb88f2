"""The extension ``fastdiff._C``: the CPU kernels, once per instruction set where it matters.

The same kernel source in ``csrc/cpu/kernels`` is compiled for each instruction set and the running
processor's is chosen at run time, which setuptools' one-set-of-flags extensions cannot express.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from tools.build.common import (
    COMMON_FLAGS,
    COMPILE_RULE,
    CSRC,
    CannotBuildError,
    compile_with,
    compiler,
    folder_for,
    ninja_command,
    run_ninja,
    torch_flags,
    torch_libraries,
)

# at::vec picks its vector width from these macros; x86 gets four variants, others the portable one.
AVX512 = "-DCPU_CAPABILITY_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
X86_ISAS = {
    "DEFAULT": "-DCPU_CAPABILITY=DEFAULT -DCPU_CAPABILITY_DEFAULT",
    "AVX2": "-DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -mavx2 -mfma -mf16c",
    "AVX512": f"-DCPU_CAPABILITY=AVX512 {AVX512}",
    "AVX512_BF16": f"-DCPU_CAPABILITY=AVX512_BF16 {AVX512} -mavx512bf16",
}
# What multiplies bfloat16. Where the processor has no tiles a local build emulates them, for tests.
DOTS = X86_ISAS["AVX512_BF16"]
TILES = DOTS.replace("=AVX512_BF16", "=AMX") + " -mamx-tile -mamx-bf16"
EMULATED = "-DFASTDIFF_TILES_EMULATED"
# Stops at the first access out of bounds and at undefined behaviour.
SANITIZERS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


def isas(local: bool) -> dict[str, str]:
    """Instruction sets to compile for, with their flags.

    Args:
        local: for this machine alone: the best set that its processor has, and beside it the
            portable one, which runs should the build ever be moved to a lesser processor. Else
            every set of this machine's architecture, as a wheel for other machines needs.
            FASTDIFF_ISAS=local or all decides in its place.
    """
    only = sanitized()
    if only:
        return {"DEFAULT": X86_ISAS[only].replace(f"CAPABILITY={only} ", "CAPABILITY=DEFAULT ")}
    every, best = isas_of_machine(), best_isa()
    if not for_this_machine(local):
        return every
    # -O2 for the set that is not to run here, unless that is the best: -O3 takes two thirds longer.
    return {"DEFAULT": f"{every['DEFAULT']} -O2", best: every[best]}


def for_this_machine(local: bool) -> bool:
    """Whether to build for this machine alone. ``local`` as for `isas`."""
    wanted = os.environ.get("FASTDIFF_ISAS") or ("local" if local else "all")
    if wanted not in ("all", "local"):
        raise CannotBuildError(f"FASTDIFF_ISAS is {wanted!r}, wanted all, local or unset")
    return wanted == "local" or sanitized() is not None


def bf16_isas(local: bool) -> dict[str, str]:
    """The sets to compile the kernels in csrc/cpu/kernels/bf16 for, with their flags.

    They are AVX512_BF16 and AMX. Where this machine's processor has no tiles a build for it alone
    emulates them, so that tests run their kernels. ``local`` as for `isas`.
    """
    flags = list(isas(local).values())[-1]
    if not for_this_machine(local):
        return {"AVX512_BF16": DOTS, "AMX": TILES} if "-mavx512bf16" in flags else {}
    found = {"AVX512_BF16": DOTS} if "-mavx512bf16" in flags else {}
    if "AVX512_BF16" in found and has_flags(TILES) and sanitized() is None:
        return {**found, "AMX": TILES}
    emulated = re.sub(r"CPU_CAPABILITY=\w+", "CPU_CAPABILITY=AMX", flags)
    return {**found, "AMX": f"{emulated} {EMULATED}"}


def isas_of_machine() -> dict[str, str]:
    """Instruction sets that processors of this machine's architecture may have."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return X86_ISAS
    return {"DEFAULT": X86_ISAS["DEFAULT"]}


def build(name: str, *, local: bool) -> Path:
    """Build the extension as a library of that file name; CannotBuildError where that fails.

    ``local`` as for `isas`.
    """
    only = sanitized()
    folder = folder_for(f"ninja-sanitized-{only}" if only else "ninja")
    run_ninja(folder, build_file(folder / name, isas(local), bf16_isas(local)))
    return folder / name


def sanitized() -> str | None:
    """The instruction set that FASTDIFF_SANITIZE names, to build with sanitizers for it alone.

    Its kernels stand in for the portable ones, the only others. ``best`` is the set that this
    machine's processor would use.
    """
    wanted = os.environ.get("FASTDIFF_SANITIZE")
    if wanted and wanted not in (*X86_ISAS, "best"):
        raise CannotBuildError(
            f"FASTDIFF_SANITIZE is {wanted!r}, wanted one of {', '.join(X86_ISAS)}, best, or unset"
        )
    return best_isa() if wanted == "best" else wanted or None


@cache
def best_isa() -> str:
    """The last instruction set whose every flag this machine's processor has."""
    return [isa for isa, flags in isas_of_machine().items() if has_flags(flags)][-1]


def has_flags(flags: str) -> bool:
    """Whether this machine's processor has every instruction set that the flags allow."""
    wanted = {flag[2:].replace("-", "_") for flag in flags.split() if flag.startswith("-m")}
    return wanted <= _features()


@cache
def _features() -> set[str]:
    """What the compiler knows of this machine's processor, in the names of its flags."""
    probe = [*compiler().split(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    found = subprocess.run(probe, capture_output=True, text=True, check=False).stdout
    return {line.split()[1].strip("_").lower() for line in found.splitlines()}


def check() -> None:
    """CannotBuildError where something is missing that the build needs."""
    ninja_command(), compiler(), torch_flags()


def build_file(output: Path, sets: dict[str, str], bf16: dict[str, str]) -> list[str]:
    """The lines of build.ninja: one edge per (source, instruction set), one link.

    Args:
        output: the library.
        sets: instruction sets of the kernels, with their flags.
        bf16: those of the kernels whose products are of bfloat16.
    """
    flags = [
        COMMON_FLAGS,
        "$optimise",
        # at::parallel_for is serial without it. The link names no OpenMP library: the symbols
        # come from the one that torch has loaded, and so do the threads.
        *(["-fopenmp"] if sys.platform == "linux" else []),
        *([f"-DFASTDIFF_SANITIZED='\"{sanitized()}\"'"] if sanitized() else []),
        torch_flags(),
    ]
    lines = [
        f"cxx = {compiler()}",
        f"optimise = {SANITIZERS if sanitized() else '-O3'}",
        f"flags = {' '.join(flags)}",
        *COMPILE_RULE,
        "rule link",
        f"  command = $cxx $optimise -shared $in -o $out {torch_libraries()} -ltorch_cpu -lc10",
        "  description = link $out",
    ]
    bindings = sorted(CSRC.glob("*.cpp")) + sorted(CSRC.glob("cpu/*.cpp"))
    objects = [f"{source.parent.name}_{source.stem}.o" for source in bindings]
    # Which sets there are is the bindings' alone to know: the kernels' objects serve any choice.
    have = " ".join(f"-DFASTDIFF_HAVE_{isa}" for isa in sets)
    have += " -DFASTDIFF_HAVE_DOTS" if "AVX512_BF16" in bf16 else ""
    have += " -DFASTDIFF_HAVE_TILES" if "AMX" in bf16 else ""
    have += f" {EMULATED}" if EMULATED in bf16.get("AMX", "") else ""
    lines += compile_with(CSRC / "precompiled.h", bindings, objects, "bindings", have)
    kernels = sorted(CSRC.glob("cpu/kernels/*.cpp"))
    of_bf16 = sorted(CSRC.glob("cpu/kernels/bf16/*.cpp"))
    for sources, several, name in ((kernels, sets, ""), (of_bf16, bf16, "bf16_")):
        for isa, more in several.items():
            made = [f"{name}{source.stem}.{isa}.o" for source in sources]
            header = CSRC / "cpu/kernels/precompiled.h"
            lines += compile_with(header, sources, made, name + isa, more)
            objects += made
    lines.append(f"build {output}: link {' '.join(objects)}")
    return lines
