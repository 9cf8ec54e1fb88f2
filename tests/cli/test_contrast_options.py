"""--guidance-mode, --autoguidance and --perturb of fastdiff sample and fastdiff eval."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_calls import TINY, call
from PIL import Image

from fastdiff.checkpoints import checkpoint
from fastdiff.data.image_grid import grid

METHODS = ("ddim", "probability-flow")  # a table of coefficients, and continuous time


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of the SDE VP, trained with label dropout."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 0), ("two", 1)):
        words = (*TINY, "--objective", "dsm", "--label-dropout", 0.5, "--steps", 2, "--seed", seed)
        assert call("train", "--data", "digits", "--out", folder / name, *words) == 0
    return [folder / "one", folder / "two"]


@pytest.mark.parametrize("method", METHODS)
def test_the_grid_is_what_the_library_draws(
    run: Callable, runs: list[Path], tmp_path: Path, method: str
) -> None:
    out, found = tmp_path / "grid.png", checkpoint.load(runs[0])
    sampler = found.diffusion().sampler(method, 3)
    words = (
        "sample", "--checkpoint", runs[0], "--out", out, "--classes", "7,1", "--per-class", 2,
        "--sampler", method, "--steps", 3, "--threads", 1, "--json", "--guidance", 3,
    )  # fmt: skip
    weaker = checkpoint.load(runs[1]).model
    cases = [
        ((), {}),
        (("--autoguidance", runs[1]), {"weaker": weaker}),
        (("--guidance-mode", "apg", "--guidance-option", "norm=2"), {"projection": {"norm": 2}}),
        (
            ("--guidance-mode", "apg", "--autoguidance", runs[1]),
            {"weaker": weaker, "projection": {}},
        ),
    ]
    pictures = set()
    for asked, options in cases:
        assert run(*words, *asked).json["guidance"] == 3
        drawn = found.sample(
            sampler, labels=[7, 7, 1, 1], guidance=3.0, progress=False,
            generator=torch.Generator().manual_seed(0), **options,
        )  # fmt: skip
        assert Image.open(out).tobytes() == grid(drawn, 2, labels=["7", "1"]).tobytes()
        pictures.add(Image.open(out).tobytes())
    assert len(pictures) == len(cases)


def test_projections_that_keep_all_are_classifier_free_guidance(runs: list[Path]) -> None:
    found = checkpoint.load(runs[0])
    for method in METHODS:
        sampler = found.diffusion().sampler(method, 3)
        plain, projected = (
            found.sample(
                sampler, labels=[7, 1], guidance=2.5, progress=False,
                generator=torch.Generator().manual_seed(0), **options,
            )
            for options in ({}, {"projection": {"eta": 1.0}})
        )  # fmt: skip
        torch.testing.assert_close(plain, projected, rtol=2e-3, atol=2e-3)


def test_what_does_not_fit(run: Callable, runs: list[Path], tmp_path: Path) -> None:
    words = ("sample", "--checkpoint", runs[0], "--out", tmp_path / "grid.png", "--steps", 2)
    words = (*words, "--sampler", "ddim", "--guidance", 2)
    other = tmp_path / "flow"
    assert call("train", "--data", "digits", "--out", other, *TINY, "--objective", "flow",
                "--steps", 1) == 0  # fmt: skip
    assert "the weaker model has the process" in run(*words, "--autoguidance", other).last
    assert "is for --guidance-mode apg" in run(*words, "--guidance-option", "eta=1").last
    wrong = run(*words, "--guidance-mode", "apg", "--guidance-option", "mood=1")
    assert (wrong.code, "'mood'" in wrong.last) == (2, True)
    momentum = ("--guidance-mode", "apg", "--guidance-option", "momentum=-0.5")
    assert run(*words, *momentum).code == 0
    assert (
        "momentum is for samplers" in run(*words, *momentum, "--sampler", "probability-flow").last
    )


@pytest.mark.parametrize("against", [(), ("--against", "digits")], ids=["digits", "against"])
def test_eval_measures_what_sample_draws(
    run: Callable, runs: list[Path], against: tuple[str, ...]
) -> None:
    """Each way of guidance changes the figures, and all are told."""
    words = ("eval", "--checkpoint", runs[0], "--samples", 100, "--sampler", "ddim", "--steps", 2,
             "--threads", 1, "--guidance", 3, "--json", *against)  # fmt: skip
    distances = []
    for asked, told in (
        ((), {"guidance_mode": "cfg", "autoguidance": None}),
        (("--autoguidance", runs[1]), {"autoguidance": str(runs[1])}),
        (
            ("--guidance-mode", "apg", "--guidance-option", "norm=0.2"),
            {"guidance_mode": "apg", "guidance_options": {"norm": 0.2}},
        ),
    ):
        facts = run(*words, *asked).json
        assert {name: facts[name] for name in told} == told
        distances.append(facts["frechet"])
    assert len(set(distances)) == len(distances)
    assert "is for --guidance-mode apg" in run(*words, "--guidance-option", "eta=1").last
