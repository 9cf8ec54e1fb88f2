"""The options that say how a folder's images are read, for both commands that train on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_calls import TINY
from PIL import Image

from fastdiff.checkpoints import checkpoint, classifier_checkpoint


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A folder of two classes of 8x8 images, 12 bits a value in files of 16."""
    root = tmp_path / "deep"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 4096, (8, 8)).astype(np.uint16)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_a_range_of_values(run: Callable, deep: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--data", deep, "--out", out, "--grayscale")
    with pytest.warns(UserWarning, match="--value-range 0 4095"):
        assert run("train", *TINY, *words, "--steps", 1).code == 0
    wanted = ("--value-range", 0, 4095)
    ran = run("train", "--out", out, "--resume", "--steps", 2, *wanted)
    assert ran.code == 2
    assert "cannot change --value-range: it has None, got (0.0, 4095.0)" in ran.last
    out = tmp_path / "ranged"
    words = ("--data", deep, "--out", out, "--grayscale", *wanted)
    assert run("train", *TINY, *words, "--steps", 1).code == 0
    assert run("train", "--out", out, "--resume", "--steps", 2).code == 0
    assert run("train", "--out", out, "--resume", "--steps", 3, *wanted).code == 0
    assert checkpoint.load(out).step == 3
    words = ("--checkpoint", out, "--data", deep, "--out", tmp_path / "classifier", *wanted)
    shape = ("--channels", "8,8", "--attention", "none", "--steps", 1, "--batch-size", 2)
    assert run("train-classifier", *words, *shape).code == 0
    assert classifier_checkpoint.load(tmp_path / "classifier").classes == ("cat", "dog")


def test_a_range_that_is_none(run: Callable, deep: Path, tmp_path: Path) -> None:
    words = ("train", *TINY, "--data", deep, "--out", tmp_path / "run", "--steps", 1)
    ran = run(*words, "--value-range", 4095, 0)
    assert ran.code == 2
    assert "the lower first, got 4095 and 0" in ran.last
    assert run(*words, "--value-range", 4095).code == 2


def test_bad_files_are_one_line_and_can_be_left_out(
    run: Callable, deep: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat/bad.png", "dog/bad\n.png"):
        (deep / name).write_bytes(b"no pixels")
    wanted = ("--value-range", 0, 4095)
    words = ("train", *TINY, "--data", deep, "--out", tmp_path / "run", "--steps", 1, *wanted)
    ran = run(*words)
    assert ran.code == 2
    assert ran.last.startswith("fastdiff: error: cannot read 2 of 6 images: ")
    assert "--skip-bad" in ran.last
    ran = run(*words, "--skip-bad")
    assert ran.code == 0
    assert "4 images of 3x8x8, 2 classes" in ran.err
    assert "left out 2 of 6 images that cannot be read" in caplog.text
