"""The wheel of ``make wheel`` in an environment that has neither the sources nor a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.build import cpu
from tools.build.common import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="the paths of Unix")]
PIP = (
    "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check",
    "--constraint", str(ROOT / "constraints.txt"),
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from the checkout, whose compiled objects are used again."""
    folder = tmp_path_factory.mktemp("dist")
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    environment = {key: value for key, value in os.environ.items() if key != "FASTDIFF_ISAS"}
    done = subprocess.run(
        [sys.executable, *command, str(ROOT)],
        env={**environment, "FASTDIFF_CPU": "1", "FASTDIFF_CUDA": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def fastdiff(wheel, tmp_path_factory):
    """A function that runs the installed command, and gives what it printed."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    # PYTHONPATH may name the checkout, and pip would take fastdiff for installed.
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([python, *PIP, wheel], cwd=folder, env=clean, check=True)
    empty = folder / "empty"
    empty.mkdir()

    def run(*arguments):
        # The PATH has the environment's programs alone: no compiler, no ninja, no git.
        done = subprocess.run(
            [python.parent / "fastdiff", *arguments],
            cwd=empty, env={"PATH": str(python.parent), "HOME": str(empty)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = empty
    return run


def test_it_has_the_package_and_nothing_else(wheel) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    sources = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "py.typed", "pretrained/*/*")
        for path in (ROOT / "fastdiff").rglob(pattern)
    }
    kernels = {f"fastdiff/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    others = set(names) - sources - kernels
    assert sources | kernels <= set(names)
    assert sorted(name.split(".")[0] for name in others) == ["fastdiff/_C", "fastdiff/_cuda"]
    assert "fastdiff/_cuda.not_built" in others


def test_it_samples_where_nothing_can_be_compiled(fastdiff) -> None:
    fastdiff("sample", "--steps", "5", "--per-class", "1", "--out", "digits.png")
    assert (fastdiff.folder / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_its_kernels_are_right_and_for_every_processor(fastdiff) -> None:
    facts = json.loads(fastdiff("doctor", "--json"))
    assert facts["ok"]
    assert facts["backend"] == "cpu"
    sets = {**cpu.isas_of_machine(), **cpu.bf16_isas(local=False)}
    assert facts["instruction_sets"] == list(sets)
