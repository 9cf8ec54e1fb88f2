"""Builds the extensions ``fastdiff._C`` and ``fastdiff._cuda`` with ninja; tools/build says how.

Nothing is compiled twice: ninja tracks headers too. What cannot be built is left out, and the
reason is left for ``fastdiff doctor``.

Environment: FASTDIFF_CPU=0|1 and FASTDIFF_CUDA=0|1 forbid or force a part (a forced part that
cannot be built is an error), CXX names the compiler, CUDA_HOME the CUDA toolkit,
TORCH_CUDA_ARCH_LIST the devices to compile for, MAX_JOBS how many compilers run at once,
FASTDIFF_ISAS which instruction sets the CPU kernels are compiled for: ``local``, this processor's
and the portable one, as in-place and editable builds do by themselves, or ``all``, as wheels do.
FASTDIFF_SANITIZE is the one instruction set that ``make asan`` builds the CPU part for (``best`` is
this machine's).
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Installers run this file without its folder on the path (PEP 517), and tools is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tools.build import cpu, cuda
from tools.build.common import CannotBuildError

PARTS = {"fastdiff._C": ("CPU", cpu), "fastdiff._cuda": ("CUDA", cuda)}


def part_wanted(name: str) -> bool | None:
    """Read FASTDIFF_<name>: True forces the part, False forbids it, None leaves the choice open."""
    value = os.environ.get(f"FASTDIFF_{name}", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"fastdiff: FASTDIFF_{name} is {value!r}, wanted 0, 1 or unset")
    return {"": None, "0": False, "1": True}[value]


class NinjaBuild(build_ext):
    """Builds each extension with ninja, or leaves it out and says why."""

    def run(self) -> None:
        """Build what was asked for and is possible."""
        self.reasons: dict[str, str] = {}  # of the extensions that are left out
        wanted = {ext.name: part_wanted(PARTS[ext.name][0]) for ext in self.extensions}
        for ext in self.extensions:
            if wanted[ext.name] is False:
                self.reasons[ext.name] = f"FASTDIFF_{PARTS[ext.name][0]}=0 forbade it"
            else:
                self.attempt(ext, PARTS[ext.name][1].check)
        # Else it is a wheel, for other machines too. Setuptools resets `inplace` while it builds.
        self.local = bool(self.inplace or self.editable_mode)
        every, self.extensions = self.extensions, self.possible()
        super().run()
        for ext in every:
            # Beside where the extension is or would be; fastdiff/ops/backend.py reads it.
            target = Path(self.get_ext_fullpath(ext.name))
            note = target.with_name(f"{ext.name.split('.')[-1]}.not_built")
            note.unlink(missing_ok=True)
            if ext.name in self.reasons:
                target.unlink(missing_ok=True)  # an earlier build's must not be packed or used
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(self.reasons[ext.name] + "\n", encoding="utf-8")
        self.tell(wanted)

    def attempt(self, ext: Extension, action) -> object:
        """action(); where it cannot be done the extension is left out, or it is an error."""
        name = PARTS[ext.name][0]
        try:
            return action()
        except CannotBuildError as reason:
            if part_wanted(name):
                raise SystemExit(f"fastdiff: FASTDIFF_{name}=1, but {reason}") from None
            self.reasons[ext.name] = str(reason)
            return None

    def possible(self) -> list[Extension]:
        """The extensions that nothing has been found against."""
        return [ext for ext in self.extensions if ext.name not in self.reasons]

    def build_extension(self, ext: Extension) -> None:
        """Run ninja, and copy what it made to where setuptools wants it."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = partial(PARTS[ext.name][1].build, output.name, local=self.local)
        library = self.attempt(ext, build)
        if library is None:
            self.extensions = self.possible()
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        if not output.exists() or output.stat().st_mtime_ns < library.stat().st_mtime_ns:
            fresh = output.with_suffix(".new")
            shutil.copyfile(library, fresh)
            fresh.replace(output)  # a process that has loaded the old one keeps it

    def tell(self, wanted: dict[str, bool | None]) -> None:
        """Say plainly what is missing: loudly where it makes everything slow."""
        line = "=" * 79
        for name, reason in self.reasons.items():
            if name == "fastdiff._C":
                print(
                    f"{line}\nfastdiff: the CPU kernels were NOT built: {reason}.\n"
                    f"fastdiff installs without them and runs on the reference backend.\n{line}",
                    file=sys.stderr,
                )
            elif wanted[name] is None:
                print(f"fastdiff: without the CUDA extension: {reason}", file=sys.stderr)


class BuildPython(build_py):
    """Installs the folder ``kernels`` beside ``fastdiff/kernels.py``, which imports from it."""

    def finalize_options(self) -> None:
        """Add the folder to the packages: it is not found as one, since it has no __init__.py."""
        super().finalize_options()
        self.packages = [*self.packages, "fastdiff.kernels"]
        self.package_dir = {**self.package_dir, "fastdiff.kernels": "kernels"}

    def run(self) -> None:
        """Copy afresh: a file that an earlier build copied may be gone from the sources."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "fastdiff"), ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension(name, sources=[]) for name in PARTS],
    cmdclass={"build_ext": NinjaBuild, "build_py": BuildPython},
)
