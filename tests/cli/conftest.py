"""Tiny models, trained once by the command line itself, and ways to call it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import TINY, Ran, call
from PIL import Image

import fastdiff


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process and catch what it prints."""

    def runner(*words: object) -> Ran:
        capfd.readouterr()
        code = call(*words)
        return Ran(code, *capfd.readouterr())

    return runner


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start ``python -m fastdiff`` in a process of its own, in an empty folder."""

    def starter(*words: object, before: str = "") -> subprocess.Popen[str]:
        code = f"import runpy, sys\n{before}\nrunpy.run_module('fastdiff', run_name='__main__')"
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(fastdiff.__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return starter


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits, class-conditional, with checkpoints of steps 3 and 6."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert (
        call("train", "--data", "digits", "--out", out, *TINY, "--steps", 6, "--save-every", 3) == 0
    )
    return out


@pytest.fixture
def copied_run(digits_run: Path, tmp_path: Path) -> Path:
    """A copy of ``digits_run`` to change."""
    return Path(shutil.copytree(digits_run, tmp_path / "copied"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 8x8 images in two sub-folders, cat and dog."""
    root = tmp_path_factory.mktemp("data") / "pictures"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A finished run on images without classes, in colour."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    words = ("train", "--data", pictures, "--unconditional", "--out", out, *TINY, "--steps", 2)
    assert call(*words) == 0
    return out
