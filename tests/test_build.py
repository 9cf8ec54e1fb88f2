"""Building and installing: without a compiler, forced, forbidden, and what a wheel holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("fastdiff", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")
CLEAN = ("CXX", "FASTDIFF_CPU", "FASTDIFF_CUDA", "MAX_JOBS", "PYTHONPATH")
PIP_WHEEL = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", ".")


# A checkout installed in place answers for modules that the unpacked wheel lacks: out with it.
ALONE = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
"""


def run(arguments, folder, **environment):
    clean = {key: value for key, value in os.environ.items() if key not in CLEAN}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**clean, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def source(tmp_path):
    """A copy of the sources without anything built."""
    for part in PARTS:
        target = tmp_path / part
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "_C.not_built")
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
    "cuda": ({"FASTDIFF_CUDA": "1"}, "FASTDIFF_CUDA=1, but this version has no CUDA part"),
    "neither 0 nor 1": ({"FASTDIFF_CPU": "yes"}, "FASTDIFF_CPU is 'yes', wanted 0, 1 or unset"),
}


@pytest.mark.parametrize(("environment", "message"), FORCED.values(), ids=FORCED)
def test_forced_and_impossible_is_an_error(source, environment, message) -> None:
    done = run(["setup.py", "build_ext", "--inplace"], source, **environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(source.rglob("*.so"))


def test_a_stale_extension_is_not_packed(source, installed) -> None:
    """One left by an earlier build would be loaded although its kernels were forbidden."""
    stale = source / "build" / f"lib.{_platform()}" / "fastdiff"
    stale.mkdir(parents=True)
    (stale / _extension()).write_bytes(b"old")
    site = installed(FASTDIFF_CPU="0")
    assert not list(site.rglob("*.so"))


def _platform() -> str:
    return f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def _extension() -> str:
    return "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
