"""The extension ``fastdiff._cuda``: the kernels by nvcc, the bindings by the C++ compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

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
    torch_facts,
    torch_flags,
    torch_libraries,
)

OLDEST = 80  # the compute capability that the kernels need, times ten
DEFAULT = ("8.0", "9.0", "10.0")


class Toolkit(NamedTuple):
    """A CUDA toolkit."""

    nvcc: str
    version: str
    includes: tuple[str, ...]
    libraries: tuple[str, ...]
    codes: frozenset[int]  # compute capabilities that it compiles for, times ten


class Architecture(NamedTuple):
    """A compute capability to compile for, and whether its PTX is kept for later devices."""

    number: str  # "80", "90a"
    ptx: bool


@cache
def toolkit() -> Toolkit:
    """The toolkit that CUDA_HOME, PATH or /usr/local/cuda names; CannotBuildError without one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        raise CannotBuildError(f"nvcc was not found (tried {', '.join(places)})")

    def said(*arguments: str) -> str:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise CannotBuildError(f"{nvcc} {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout + done.stderr

    found = re.search(r"release (\d+\.\d+)", said("--version"))
    # Where nvcc itself looks, whatever stands between it and the name that was found.
    plan = said("--dryrun", "-x", "cu", "-o", os.devnull, os.devnull)
    return Toolkit(
        nvcc,
        found[1] if found else "unknown",
        tuple(re.findall(r'"-I([^"]+)"', next(iter(re.findall(r"INCLUDES=(.*)", plan)), ""))),
        tuple(re.findall(r'"-L([^"]+)"', next(iter(re.findall(r"LIBRARIES=(.*)", plan)), ""))),
        frozenset(int(number) for number in re.findall(r"sm_(\d+)\b", said("--list-gpu-code"))),
    )


def devices() -> str | None:
    """The compute capabilities of this machine's GPUs, as TORCH_CUDA_ARCH_LIST lists them."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    found = sorted(set(re.findall(r"^\d+\.\d$", done.stdout, re.MULTILINE)), key=float)
    return ";".join(found) + "+PTX" if found else None


def architectures(listed: str | None, codes: frozenset[int]) -> list[Architecture]:
    """What to compile for.

    Args:
        listed: TORCH_CUDA_ARCH_LIST, like "8.0;9.0+PTX" or "8.0 9.0"; None or nothing is Ampere,
            Hopper and Blackwell as far as nvcc knows them, with PTX of the last. Capabilities that
            the kernels are too new for are passed over.
        codes: what nvcc compiles for.

    Raises:
        CannotBuildError: an entry is no compute capability or nvcc does not know it, or none is
            left.
    """
    if not listed:
        known = [name for name in DEFAULT if int(name.replace(".", "")) in codes]
        listed = " ".join(known) + "+PTX" if known else ""
    found = []
    for entry in re.split(r"[;\s]+", listed.strip(" ;")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise CannotBuildError(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}, wanted compute capabilities like 8.0 or "
                "9.0+PTX, separated by semicolons or spaces"
            )
        number = int(match[1] + match[2])
        if number < OLDEST:
            continue
        if number not in codes:
            raise CannotBuildError(f"nvcc does not compile for compute capability {entry}")
        found.append(Architecture(f"{number}{match[3]}", bool(match[4])))
    if not found:
        raise CannotBuildError(f"none of the compute capabilities {listed!r} is 8.0 or newer")
    return found


def chosen_architectures(*, local: bool = False) -> list[Architecture]:
    """What the environment's TORCH_CUDA_ARCH_LIST asks for, see `architectures`.

    Without it a ``local`` build is for this machine's GPUs, where it has any.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or (devices() if local else None)
    return architectures(listed, toolkit().codes)


def nvcc_flags(chosen: list[Architecture]) -> str:
    """What the kernels are compiled with."""
    targets = []
    for number, ptx in chosen:
        targets.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if ptx:
            targets.append(f"-gencode arch=compute_{number},code=compute_{number}")
    host = "-Xcompiler -fPIC,-fvisibility=hidden,-fno-strict-aliasing"
    return f"-std=c++20 -O3 {host} -I{CSRC} {' '.join(targets)}"


def check() -> None:
    """CannotBuildError where something is missing that the build needs."""
    facts = torch_facts()
    if facts["cuda"] is None:
        raise CannotBuildError(f"torch {facts['version']} is a build without CUDA")
    found = toolkit()
    if found.version.split(".")[0] != facts["cuda"].split(".")[0]:
        raise CannotBuildError(
            f"{found.nvcc} is of CUDA {found.version}, torch is built for CUDA {facts['cuda']}"
        )
    chosen_architectures()
    ninja_command(), compiler()


def build(name: str, *, local: bool) -> Path:
    """Build the extension as a library of that file name; CannotBuildError where that fails.

    ``local`` as for `chosen_architectures`.
    """
    folder = folder_for("ninja-cuda")
    chosen = chosen_architectures(local=local)
    link = f"{torch_libraries()} -ltorch_cpu -ltorch_cuda -lc10 -lc10_cuda -lcudart"
    run_ninja(folder, build_file(folder / name, chosen, link=link))
    return folder / name


def build_file(
    output: Path, chosen: list[Architecture], *, link: str, more_nvcc: str = "", more_cxx: str = ""
) -> list[str]:
    """The lines of build.ninja: one edge per source, one link."""
    found, cxx = toolkit(), compiler()
    listed = ";".join(map(capability, chosen))
    flags = [
        COMMON_FLAGS,
        "-O2",
        f"'-DFASTDIFF_ARCHITECTURES=\"{listed}\"'",
        torch_flags(),
        *(f"-isystem {path}" for path in found.includes),
        more_cxx,
    ]
    places = " ".join(f"-L{path}" for path in found.libraries if "stubs" not in path)
    lines = [
        f"cxx = {cxx}",
        f"flags = {' '.join(flags)}",
        *COMPILE_RULE,
        "rule nvcc",
        f"  command = {found.nvcc} -ccbin {cxx} {nvcc_flags(chosen)} {more_nvcc} -MD -MF $out.d "
        "-c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $out",
        "rule link",
        f"  command = $cxx -shared $in -o $out {places} {link}",
        "  description = link $out",
    ]
    bindings = [CSRC / "cuda" / "binding.cpp", *sorted(CSRC.glob("cuda/bindings/*.cpp"))]
    objects = [f"{source.stem}.o" for source in bindings]
    lines += compile_with(CSRC / "precompiled.h", bindings, objects, "bindings")
    for source in sorted(CSRC.glob("cuda/*.cu")):
        objects.append(f"{source.stem}.cu.o")
        lines.append(f"build {objects[-1]}: nvcc {source}")
    lines.append(f"build {output}: link {' '.join(objects)}")
    return lines


def capability(architecture: Architecture) -> str:
    """As TORCH_CUDA_ARCH_LIST writes it: 8.0, 9.0a, 10.0+PTX."""
    digits = architecture.number.rstrip("af")
    suffix = architecture.number[len(digits) :]
    return f"{digits[:-1]}.{digits[-1]}{suffix}" + ("+PTX" if architecture.ptx else "")
