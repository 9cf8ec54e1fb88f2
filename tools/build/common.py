"""What every build needs: the compiler, ninja, and the facts of the torch to build against."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build"
COMMON_FLAGS = " ".join(
    [
        "-std=c++20 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas",
        # From inside the compiler's and PyTorch's own vector headers.
        "-Wno-maybe-uninitialized -Wno-uninitialized -Wno-psabi",
    ]
)

# Run in the target environment's own interpreter (-I leaves pip's build isolation), so that the
# extension is built against the torch it will run with, not against a second one. PyTorch itself,
# which takes seconds to import, is only looked at.
TORCH_PROBE = """
import importlib.util, json, pathlib, runpy, sys
spec = importlib.util.find_spec("torch")
if spec is None or not spec.submodule_search_locations:
    sys.exit("torch is not installed")
folder = pathlib.Path(spec.submodule_search_locations[0])
facts = runpy.run_path(str(folder / "version.py"))
include = [str(folder / part) for part in ("include", "include/torch/csrc/api/include")]
print(json.dumps(dict(version=facts["__version__"], cuda=facts["cuda"], include=include,
                      lib=[str(folder / "lib")])))
"""


class CannotBuildError(Exception):
    """A part cannot be built here; the text says why."""


@cache
def torch_facts() -> dict:
    """Version, CUDA's version, headers and libraries of the torch that will load it all."""
    reasons = []
    for flags in (["-I"], []):
        probe = subprocess.run(
            [sys.executable, *flags, "-c", TORCH_PROBE], capture_output=True, text=True
        )
        if probe.returncode == 0:
            return json.loads(probe.stdout.splitlines()[-1])
        reasons.append((probe.stderr.strip().splitlines() or ["no output"])[-1])
    raise CannotBuildError(
        f"torch is not found by {sys.executable} ({reasons[0]}); install torch first, then "
        "fastdiff, with --no-build-isolation if your installer builds in a separate environment"
    )


def compiler() -> str:
    """The C++ compiler's command."""
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["g++", "c++", "clang++"]:
        if shutil.which(candidate.split()[0]):
            return candidate
    raise CannotBuildError(f"no C++ compiler found (tried {wanted or 'g++, c++, clang++'})")


@cache
def ninja_command() -> tuple[str, ...]:
    """How to run ninja: the PyPI package or the system's."""
    found = subprocess.run([sys.executable, "-m", "ninja", "--version"], capture_output=True)
    if found.returncode == 0:
        return (sys.executable, "-m", "ninja")
    if shutil.which("ninja"):
        return ("ninja",)
    raise CannotBuildError("ninja is not installed (pip install ninja)")


def torch_flags() -> str:
    """What a source that includes PyTorch's or Python's headers is compiled with."""
    facts = torch_facts()
    includes = [*facts["include"], sysconfig.get_path("include")]
    try:
        import pybind11

        includes.append(pybind11.get_include())
    except ImportError:
        pass  # PyTorch brings one of its own
    return " ".join(
        [
            "-D_GLIBCXX_USE_CXX11_ABI=1",  # as every torch since 2.7; some compilers default to 0
            f'-DFASTDIFF_TORCH_VERSION=\\"{facts["version"]}\\"',
            f"-I{CSRC}",
            *(f"-isystem {path}" for path in includes),
        ]
    )


def torch_libraries() -> str:
    """Where the linker and the loader find PyTorch's libraries."""
    return " ".join(f"-L{path} -Wl,-rpath,{path}" for path in torch_facts()["lib"])


def folder_for(kind: str) -> Path:
    """The build folder of a kind of objects, for this torch, Python and machine."""
    tag = f"{sys.implementation.cache_tag}-torch{torch_facts()['version']}-{platform.machine()}"
    return BUILD / f"{kind}-{tag}"


COMPILE_RULE = (
    "rule compile",
    "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
    "  depfile = $out.d",
    "  deps = gcc",
    "  description = compile $out",
)


def compile_with(
    header: Path, sources: Sequence[Path], objects: Sequence[str], folder: str, more: str = ""
) -> list[str]:
    """The lines of build.ninja for sources that include ``header``, which is compiled once for all.

    Args:
        header: in csrc; PyTorch's headers take up to 20 seconds.
        sources: to compile.
        objects: what they become.
        folder: for the compiled header, another one for other flags.
        more: flags.
    """
    name = header.relative_to(CSRC)
    ready = f"{folder}/{name}.gch"
    lines = [f"build {ready}: compile {header}", f"  more = {more} -x c++-header"]
    for source, made in zip(sources, objects, strict=True):
        lines.append(f"build {made}: compile {source} | {ready}")
        lines.append(f"  more = {more} -iquote {folder} -include {name}")
    return lines


def run_ninja(folder: Path, lines: Sequence[str], *, quiet: bool = False) -> None:
    """Write the lines to build.ninja in ``folder`` and run it. One run at a time in a folder.

    Raises:
        CannotBuildError: a compiler failed; with ``quiet`` the text is what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script, text = folder / "build.ninja", "\n".join(lines) + "\n"
    jobs = os.environ.get("MAX_JOBS")
    command = [*ninja_command(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
    with (folder / "lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        done = subprocess.run(command, capture_output=quiet, text=True)
    if done.returncode:
        raise CannotBuildError(
            f"the compiler failed:\n{done.stdout}{done.stderr}"
            if quiet
            else "the compiler failed (its messages are above)"
        )
