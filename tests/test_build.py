"""Building and installing: without a compiler, forced, forbidden, and what a wheel holds."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
import torch

from tools.build import cpu, cuda
from tools.build.common import ROOT, CannotBuildError

PARTS = (
    "fastdiff",
    "kernels",
    "csrc",
    "tools",
    "setup.py",
    "MANIFEST.in",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
CLEAN = (
    "CUDA_HOME", "CXX", "FASTDIFF_CPU", "FASTDIFF_CUDA", "FASTDIFF_ISAS", "MAX_JOBS", "PYTHONPATH",
    "TORCH_CUDA_ARCH_LIST",
)  # fmt: skip
PIP_WHEEL = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", ".")


# A checkout installed in place answers for modules that the unpacked wheel lacks: out with it.
ALONE = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
"""


def run(arguments, folder, **environment):
    clean = {key: value for key, value in os.environ.items() if key not in CLEAN}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**clean, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


# The Triton kernels lie elsewhere in a checkout than where fastdiff is installed.
KERNELS = """
import pathlib
import fastdiff
from fastdiff.kernels import launch
for module in (fastdiff, launch):
    print(pathlib.Path(module.__file__).resolve().relative_to(pathlib.Path.cwd().resolve()))
"""


@pytest.fixture
def source(tmp_path):
    """A copy of the sources without anything built."""
    for part in PARTS:
        target = tmp_path / part
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.not_built")
            shutil.copytree(ROOT / part, target, ignore=ignored)
        else:
            shutil.copyfile(ROOT / part, target)
    return tmp_path


@pytest.fixture
def installed(source):
    """A function that builds a wheel under an environment and unpacks it where it can run."""

    def install(**environment):
        done = run(PIP_WHEEL, source, **environment)
        assert done.returncode == 0, done.stderr
        (wheel,) = (source / "dist").glob("*.whl")
        zipfile.ZipFile(wheel).extractall(source / "site")
        return source / "site"

    return install


def test_forbidden_the_wheel_has_everything_else(installed) -> None:
    site = installed(FASTDIFF_CPU="0")
    packages = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "py.typed", "pretrained/*/*")
        for path in (ROOT / "fastdiff").rglob(pattern)
    }
    assert {"fastdiff/cli/__init__.py", "fastdiff/py.typed"} < sources
    assert sources <= packages
    assert not any(name.endswith(".so") for name in packages)
    script = ALONE + "runpy.run_module('fastdiff', run_name='__main__')"
    done = run(["-c", script, "doctor", "--json"], site, PYTHONPATH=str(site))
    facts = json.loads(done.stdout)
    assert done.returncode == 0
    assert "NOT" not in done.stderr  # it was asked for
    assert "FASTDIFF_CPU=0 forbade it" in json.dumps(facts)
    assert {check["backend"] for check in facts["self_check"]} == {"reference"}
    launchers = {f"fastdiff/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert "fastdiff/kernels/launch.py" in launchers <= packages
    others = {name for name in packages - sources - launchers if ".dist-info/" not in name}
    assert others == {"fastdiff/_C.not_built", "fastdiff/_cuda.not_built"}
    done = run(["-c", ALONE + KERNELS], site, PYTHONPATH=str(site))
    places = ["fastdiff/__init__.py", "fastdiff/kernels/launch.py"]
    assert done.stdout.split() == places, done.stderr


def test_an_editable_install_has_the_kernels(source) -> None:
    build = "from setuptools.build_meta import build_editable; build_editable('dist')"
    done = run(["-c", build], source, FASTDIFF_CPU="0", FASTDIFF_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(source / "site")
    script = ALONE + "import site; sys.path[0] = 'site'; site.addsitedir('site')" + KERNELS
    done = run(["-c", script], source)
    assert done.stdout.split() == ["fastdiff/__init__.py", "kernels/launch.py"], done.stderr


LOOK_FOR_KERNELS = """
import transformers, peft
from diffusers import UNet2DModel
from diffusers.utils.import_utils import is_kernels_available
print(is_kernels_available(), transformers.utils.import_utils.is_kernels_available())
"""
MISSING = [name for name in ("peft", "transformers") if importlib.util.find_spec(name) is None]


@pytest.fixture
def another_projects_kernels(tmp_path):
    """A folder with an installed package named kernels that is not fastdiff's."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '99.0'\n")
    metadata = tmp_path / "kernels-99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n")
    return tmp_path


@pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")
def test_in_the_repositorys_root_others_do_not_take_our_kernels_for_a_package() -> None:
    done = run(["-c", LOOK_FOR_KERNELS], ROOT)
    assert done.stdout == "False False\n", done.stderr


def test_in_the_repositorys_root_the_package_kernels_is_found(another_projects_kernels) -> None:
    script = "import kernels, fastdiff.kernels.launch; print(kernels.__version__)"
    paths = os.pathsep.join((str(another_projects_kernels), str(ROOT)))
    assert run(["-c", script], ROOT, PYTHONPATH=paths).stdout == "99.0\n"


def test_without_a_compiler_it_installs_and_says_so(installed) -> None:
    site = installed(CXX="no-such-compiler")
    script = "import fastdiff, torch; fastdiff.ops.group_norm_silu(torch.ones(1, 2, 2, 2), 1)"
    done = run(["-c", ALONE + script], site, PYTHONPATH=str(site))
    assert done.returncode == 0
    assert "was not built: no C++ compiler found (tried no-such-compiler)" in done.stderr
    assert "running on the reference backend" in done.stderr
    script = "import fastdiff; fastdiff.backend('cpu')"
    done = run(["-W", "ignore", "-c", ALONE + script], site, PYTHONPATH=str(site))
    assert "RuntimeError: backend 'cpu' cannot run here: " in done.stderr
    assert "no C++ compiler found" in done.stderr


def test_the_build_says_that_it_left_the_kernels_out(source) -> None:
    done = run(["setup.py", "build_ext", "--inplace"], source, CXX="no-such-compiler")
    assert done.returncode == 0
    assert "the CPU kernels were NOT built: no C++ compiler found" in done.stderr
    assert "runs on the reference backend" in done.stderr


FORCED = {
    "cpu without a compiler": (
        {"FASTDIFF_CPU": "1", "CXX": "no-such-compiler"},
        "FASTDIFF_CPU=1, but no C++ compiler found",
    ),
    "cuda with a torch for CPUs": (
        {"FASTDIFF_CUDA": "1"},
        f"FASTDIFF_CUDA=1, but torch {torch.__version__} is a build without CUDA",
    ),
    "neither 0 nor 1": ({"FASTDIFF_CPU": "yes"}, "FASTDIFF_CPU is 'yes', wanted 0, 1 or unset"),
}


@pytest.mark.parametrize(("environment", "message"), FORCED.values(), ids=FORCED)
def test_forced_and_impossible_is_an_error(source, environment, message) -> None:
    done = run(["setup.py", "build_ext", "--inplace"], source, **environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(source.rglob("*.so"))


def test_what_was_left_out_has_its_reason_beside_the_package(source) -> None:
    done = run(["setup.py", "build_ext", "--inplace"], source, FASTDIFF_CPU="0", FASTDIFF_CUDA="0")
    assert done.returncode == 0
    notes = {note.name: note.read_text() for note in (source / "fastdiff").glob("*.not_built")}
    assert notes == {
        "_C.not_built": "FASTDIFF_CPU=0 forbade it\n",
        "_cuda.not_built": "FASTDIFF_CUDA=0 forbade it\n",
    }
    assert "without the CUDA extension" not in done.stderr  # it was asked for


def test_a_source_distribution_can_build(source) -> None:
    script = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    done = run(["-c", script], source)
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    for part in ("csrc", "kernels", "tools"):
        sources = (path for path in (source / part).rglob("*") if path.is_file())
        assert {path.relative_to(source).as_posix() for path in sources} <= names
    assert "setup.py" in names


# A compiler that makes empty files, and has the macros of a processor with AVX2 at most.
COMPILER = """#!/bin/sh
case " $* " in
  *" -dM "*) printf '#define __AVX2__ 1\n#define __FMA__ 1\n#define __F16C__ 1\n' ;;
esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


@pytest.fixture
def compiled(source):
    """A function that builds with COMPILER and gives the instruction sets that it was given."""
    (source / "c++").write_text(COMPILER)
    (source / "c++").chmod(0o755)

    def build(*command, **environment):
        cxx = str(source / "c++")
        done = run(command, source, CXX=cxx, FASTDIFF_CPU="1", FASTDIFF_CUDA="0", **environment)
        assert done.returncode == 0, done.stderr
        (folder,) = (source / "build").glob("ninja-*")
        return sorted(path.suffixes[0][1:] for path in folder.glob("geglu.*.o"))

    return build


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have one set")
def test_a_wheel_has_every_instruction_set(compiled) -> None:
    assert compiled(*PIP_WHEEL) == ["AVX2", "AVX512", "AVX512_BF16", "DEFAULT"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have one set")
def test_a_build_in_place_has_this_processors_set_and_the_portable_one(compiled) -> None:
    inplace = ("setup.py", "build_ext", "--inplace")
    assert compiled(*inplace) == ["AVX2", "DEFAULT"]
    assert compiled(*inplace, FASTDIFF_ISAS="all")[1:] == ["AVX512", "AVX512_BF16", "DEFAULT"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have one set")
def test_an_editable_install_has_this_processors_set_and_the_portable_one(compiled) -> None:
    build = "from setuptools.build_meta import build_editable; build_editable('dist')"
    assert compiled("-c", build) == ["AVX2", "DEFAULT"]


def test_the_best_set_alone_is_optimised_to_the_full(monkeypatch) -> None:
    monkeypatch.delenv("FASTDIFF_ISAS", raising=False)
    monkeypatch.setattr(cpu, "isas_of_machine", lambda: {"DEFAULT": "-a", "AVX2": "-b", "X": "-c"})
    monkeypatch.setattr(cpu, "best_isa", lambda: "AVX2")
    assert cpu.isas(local=True) == {"DEFAULT": "-a -O2", "AVX2": "-b"}
    assert cpu.isas(local=False) == {"DEFAULT": "-a", "AVX2": "-b", "X": "-c"}
    monkeypatch.setattr(cpu, "best_isa", lambda: "DEFAULT")
    assert cpu.isas(local=True) == {"DEFAULT": "-a"}


def test_instruction_sets_have_a_name(monkeypatch) -> None:
    monkeypatch.setenv("FASTDIFF_ISAS", "avx2")
    with pytest.raises(CannotBuildError, match="FASTDIFF_ISAS is 'avx2', wanted all, local or"):
        cpu.isas(local=True)


CODES = frozenset({75, 80, 86, 90, 100, 103, 120})
LISTED = {
    "nothing": (None, "8.0;9.0;10.0+PTX"),
    "semicolons": ("8.0;9.0+PTX", "8.0;9.0+PTX"),
    "spaces": ("8.6 10.3", "8.6;10.3"),
    "specific": ("9.0a", "9.0a"),
    "some too old": ("7.0 7.5 8.0+PTX", "8.0+PTX"),
}


@pytest.mark.parametrize(("listed", "expected"), LISTED.values(), ids=LISTED)
def test_the_devices_to_compile_for(listed, expected) -> None:
    found = cuda.architectures(listed, CODES)
    assert ";".join(map(cuda.capability, found)) == expected


def test_by_default_the_devices_are_those_that_nvcc_knows() -> None:
    found = cuda.architectures(None, frozenset({75, 80, 86, 90}))
    assert list(map(cuda.capability, found)) == ["8.0", "9.0+PTX"]
    flags = cuda.nvcc_flags(found)
    assert "arch=compute_80,code=sm_80" in flags
    assert "arch=compute_80,code=compute_80" not in flags
    assert "arch=compute_90,code=compute_90" in flags


def test_a_local_build_is_for_this_machines_devices(monkeypatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(cuda, "toolkit", lambda: cuda.Toolkit("nvcc", "13.0", (), (), CODES))
    monkeypatch.setattr(cuda, "devices", lambda: "8.6;9.0+PTX")
    found = cuda.chosen_architectures(local=True)
    assert ";".join(map(cuda.capability, found)) == "8.6;9.0+PTX"
    found = cuda.chosen_architectures()
    assert ";".join(map(cuda.capability, found)) == "8.0;9.0;10.0+PTX"


def test_devices_are_those_that_nvidia_smi_lists(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda.devices() is None
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '9.0\n8.6\n9.0'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert cuda.devices() == "8.6;9.0+PTX"


UNLISTED = {
    "a name": ("Hopper", "TORCH_CUDA_ARCH_LIST has 'Hopper', wanted compute capabilities like 8.0"),
    "unknown": ("13.0", "nvcc does not compile for compute capability 13.0"),
    "too old": ("7.0;7.5", "none of the compute capabilities '7.0;7.5' is 8.0 or newer"),
}


@pytest.mark.parametrize(("listed", "message"), UNLISTED.values(), ids=UNLISTED)
def test_devices_that_cannot_be_compiled_for(listed, message) -> None:
    with pytest.raises(CannotBuildError, match=re.escape(message)):
        cuda.architectures(listed, CODES)


NO_TOOLKIT = {
    "none": ({"nvcc": None}, "nvcc was not found (tried nvcc, /usr/local/cuda/bin/nvcc)"),
    "of another version": (
        {"nvcc": "12.4"}, "nvcc is of CUDA 12.4, torch is built for CUDA 13.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("found", "message"), NO_TOOLKIT.values(), ids=NO_TOOLKIT)
def test_a_torch_for_gpus_without_its_toolkit(monkeypatch, found, message) -> None:
    def toolkit():
        if found["nvcc"] is None:
            raise CannotBuildError("nvcc was not found (tried nvcc, /usr/local/cuda/bin/nvcc)")
        return cuda.Toolkit("nvcc", found["nvcc"], (), (), CODES)

    monkeypatch.setattr(cuda, "torch_facts", lambda: {"version": "2.13.0+cu130", "cuda": "13.0"})
    monkeypatch.setattr(cuda, "toolkit", toolkit)
    with pytest.raises(CannotBuildError, match=re.escape(message)):
        cuda.check()


def test_a_stale_extension_is_not_packed(source, installed) -> None:
    """One left by an earlier build would be loaded although its kernels were forbidden."""
    stale = source / "build" / f"lib.{_platform()}" / "fastdiff"
    stale.mkdir(parents=True)
    (stale / _extension()).write_bytes(b"old")
    (stale.parent / "fastdiff" / "renamed_since.py").touch()
    site = installed(FASTDIFF_CPU="0")
    assert not list(site.rglob("*.so"))
    assert not list(site.rglob("renamed_since.py"))


def _platform() -> str:
    return f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def _extension() -> str:
    return "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
