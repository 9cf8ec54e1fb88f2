"""Builds the C++ extension ``fastdiff._C`` with ninja, once per instruction set where it matters.

The same kernel source in ``csrc/cpu/kernels`` is compiled for each instruction set and the running
processor's is chosen at run time, which setuptools' one-set-of-flags extensions cannot express; so
this file writes a ``build.ninja`` of its own. Nothing is compiled twice: ninja tracks headers too.

Environment: FASTDIFF_CPU=0|1 and FASTDIFF_CUDA=0|1 forbid or force a part (a forced part that
cannot be built is an error), CXX names the compiler.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
NOT_BUILT = "_C.not_built"  # beside where the extension would be; fastdiff/backend.py reads it
COMMON_FLAGS = " ".join(
    [
        "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas",
        # From inside the compiler's and PyTorch's own vector headers.
        "-Wno-maybe-uninitialized -Wno-uninitialized -Wno-psabi",
    ]
)

# at::vec picks its vector width from these macros; x86 gets four variants, others the portable one.
AVX512 = "-DCPU_CAPABILITY_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
X86_ISAS = {
    "DEFAULT": "-DCPU_CAPABILITY=DEFAULT -DCPU_CAPABILITY_DEFAULT",
    "AVX2": "-DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -mavx2 -mfma -mf16c",
    "AVX512": f"-DCPU_CAPABILITY=AVX512 {AVX512}",
    "AVX512_BF16": f"-DCPU_CAPABILITY=AVX512_BF16 {AVX512} -mavx512bf16",
}

# Run in the target environment's own interpreter (-I leaves pip's build isolation), so that the
# extension is built against the torch it will run with, not against a second one.
TORCH_PROBE = """
import json, torch
from torch.utils.cpp_extension import include_paths, library_paths
print(json.dumps(dict(version=torch.__version__, abi=int(torch.compiled_with_cxx11_abi()),
                      include=include_paths(), lib=library_paths())))
"""


class CannotBuildError(Exception):
    """The CPU kernels cannot be built here; the text says why."""


def part_wanted(name: str) -> bool | None:
    """Read FASTDIFF_<name>: True forces the part, False forbids it, None leaves the choice open."""
    value = os.environ.get(f"FASTDIFF_{name}", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"fastdiff: FASTDIFF_{name} is {value!r}, wanted 0, 1 or unset")
    return {"": None, "0": False, "1": True}[value]


def torch_facts() -> dict:
    """Version, ABI, headers and libraries of the torch that the extension will load."""
    reasons = []
    for flags in (["-I"], []):
        probe = subprocess.run(
            [sys.executable, *flags, "-c", TORCH_PROBE], capture_output=True, text=True
        )
        if probe.returncode == 0:
            return json.loads(probe.stdout.splitlines()[-1])
        reasons.append((probe.stderr.strip().splitlines() or ["no output"])[-1])
    raise CannotBuildError(
        f"torch is not importable by {sys.executable} ({reasons[0]}); install torch first, then "
        "fastdiff, with --no-build-isolation if your installer builds in a separate environment"
    )


def compiler() -> str:
    """The C++ compiler's command."""
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["g++", "c++", "clang++"]:
        if shutil.which(candidate.split()[0]):
            return candidate
    raise CannotBuildError(f"no C++ compiler found (tried {wanted or 'g++, c++, clang++'})")


def ninja_command() -> list[str]:
    """How to run ninja: the PyPI package or the system's."""
    found = subprocess.run([sys.executable, "-m", "ninja", "--version"], capture_output=True)
    if found.returncode == 0:
        return [sys.executable, "-m", "ninja"]
    if shutil.which("ninja"):
        return ["ninja"]
    raise CannotBuildError("ninja is not installed (pip install ninja)")


def isas() -> dict[str, str]:
    """Instruction sets to compile for on this machine's architecture, with their flags."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return X86_ISAS
    return {"DEFAULT": X86_ISAS["DEFAULT"]}


def build_file(facts: dict, cxx: str, output: Path) -> str:
    """The text of build.ninja: one edge per (source, instruction set), one link."""
    import pybind11

    includes = [*facts["include"], pybind11.get_include(), sysconfig.get_path("include")]
    flags = " ".join(
        [
            COMMON_FLAGS,
            # at::parallel_for is serial without it. The link names no OpenMP library: the symbols
            # come from the one that torch has loaded, and so do the threads.
            *(["-fopenmp"] if sys.platform == "linux" else []),
            f"-D_GLIBCXX_USE_CXX11_ABI={facts['abi']}",
            f'-DFASTDIFF_TORCH_VERSION=\\"{facts["version"]}\\"',
            *(f"-DFASTDIFF_HAVE_{isa}" for isa in isas()),
            f"-I{CSRC}",
            *(f"-isystem {path}" for path in includes),
        ]
    )
    libs = " ".join(f"-L{path} -Wl,-rpath,{path}" for path in facts["lib"])
    lines = [
        f"cxx = {cxx}",
        f"flags = {flags}",
        "rule compile",
        "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $cxx -shared $in -o $out {libs} -ltorch_cpu -lc10",
        "  description = link $out",
    ]
    objects = []
    for source in sorted(CSRC.glob("*.cpp")) + sorted(CSRC.glob("cpu/*.cpp")):
        objects.append(f"{source.parent.name}_{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    for source in sorted(CSRC.glob("cpu/kernels/*.cpp")):
        for isa, isa_flags in isas().items():
            objects.append(f"{source.stem}.{isa}.o")
            lines += [f"build {objects[-1]}: compile {source}", f"  isa = {isa_flags}"]
    lines.append(f"build {output}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Builds the extension with ninja, or leaves it out and says why."""

    def run(self) -> None:
        """Build what was asked for and is possible."""
        if part_wanted("CUDA"):
            raise SystemExit(
                "fastdiff: FASTDIFF_CUDA=1, but this version has no CUDA part to build"
            )
        wanted = part_wanted("CPU")
        if wanted is False:
            self.leave_out("FASTDIFF_CPU=0 forbade it")
            return
        try:
            super().run()
        except CannotBuildError as reason:
            if wanted:
                raise SystemExit(f"fastdiff: FASTDIFF_CPU=1, but {reason}") from None
            self.leave_out(str(reason))

    def leave_out(self, reason: str) -> None:
        """Drop the extension, say so plainly, and leave the reason for ``fastdiff doctor``."""
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.unlink(missing_ok=True)  # one from an earlier build must not be packed or used
            target.parent.mkdir(parents=True, exist_ok=True)
            (target.parent / NOT_BUILT).write_text(reason + "\n", encoding="utf-8")
        self.extensions = []
        line = "=" * 79
        print(
            f"{line}\nfastdiff: the CPU kernels were NOT built: {reason}.\n"
            f"fastdiff installs without them and runs on the reference backend.\n{line}",
            file=sys.stderr,
        )

    def build_extension(self, ext: Extension) -> None:
        """Write build.ninja for this torch and run it."""
        ninja, cxx, facts = ninja_command(), compiler(), torch_facts()
        tag = f"{sys.implementation.cache_tag}-torch{facts['version']}-{platform.machine()}"
        folder = ROOT / "build" / f"ninja-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        (output.parent / NOT_BUILT).unlink(missing_ok=True)
        library = folder / output.name
        text = build_file(facts, cxx, library)
        script = folder / "build.ninja"
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        jobs = os.environ.get("MAX_JOBS")
        command = [*ninja, "-C", str(folder), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command).returncode:
            raise CannotBuildError("the compiler failed (its messages are above)")
        if not output.exists() or output.stat().st_mtime_ns < library.stat().st_mtime_ns:
            shutil.copyfile(library, output)


setup(ext_modules=[Extension("fastdiff._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
