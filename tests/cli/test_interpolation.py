"""fastdiff sample --interpolate: rows of images between two images or two seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import TINY, call
from PIL import Image

from fastdiff.checkpoints import checkpoint
from fastdiff.data.image_grid import grid
from fastdiff.generation import slerp


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert call("train", "--data", "digits", "--out", out, *TINY, "--steps", 1) == 0
    return out


def test_seeds_are_joined(run: Callable, digits: Path, tmp_path: Path) -> None:
    out, found = tmp_path / "row.png", checkpoint.load(digits)
    words = ("sample", "--checkpoint", digits, "--out", out, "--sampler", "ddim", "--steps", 3)
    words = (*words, "--threads", 1, "--json", "--interpolate", 4, 5)
    facts = run(*words, "--classes", "7,1", "--per-class", 3).json
    assert (facts["images"], facts["interpolate"]) == (6, ["4", "5"])
    ends = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (4, 5)]
    row = slerp(*ends, torch.tensor([0.0, 0.5, 1.0]))
    drawn = found.sample(
        found.diffusion().sampler("ddim", 3), labels=[7] * 3 + [1] * 3,
        noise=torch.cat([row, row]), progress=False,
    )  # fmt: skip
    assert Image.open(out).tobytes() == grid(drawn, 3, labels=["7", "1"]).tobytes()


def test_images_are_the_ends_of_their_row(run: Callable, digits: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = []
    for name in ("a.png", "b.png"):
        pixels = rng.integers(60, 196, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        names.append(tmp_path / name)
    out = tmp_path / "row.png"
    words = ("sample", "--checkpoint", digits, "--out", out, "--sampler", "ode", "--threads", 1)
    words = (*words, "--option", "rtol=1e-4", "--option", "atol=1e-4", "--classes", 3)
    assert run(*words, "--per-class", 3, "--interpolate", *names).code == 0
    picture = np.asarray(Image.open(out).convert("L")).astype(int)
    left = picture.shape[1] - 3 * (64 + 4)  # images of 8 pixels are drawn 8 times as large
    for place, name in ((0, "a.png"), (2, "b.png")):
        at = left + place * 68
        tile = picture[4:68:8, at : at + 64 : 8]
        wanted = np.asarray(Image.open(tmp_path / name)).astype(int)
        # The ODE is solved to its tolerance, there and back; other images differ by 100 levels.
        assert np.abs(tile - wanted).max() <= 5


def test_what_does_not_fit(run: Callable, digits: Path, tmp_path: Path) -> None:
    words = ("sample", "--checkpoint", digits, "--out", tmp_path / "row.png", "--classes", 3)
    ends = ("--interpolate", 1, 2)
    noisy = run(*words, *ends, "--sampler", "ddpm", "--steps", 2)
    assert (noisy.code, "needs a sampler without noise" in noisy.last) == (2, True)
    assert "adaptive adds some" in run(*words, *ends, "--sampler", "adaptive").last
    ddim = ("--sampler", "ddim", "--steps", 2)
    missing = run(*words, *ddim, "--interpolate", 1, tmp_path / "none.png")
    assert (missing.code, "takes image files or seeds, got" in missing.last) == (2, True)
    assert "two images or more" in run(*words, *ddim, *ends, "--per-class", 1).last
