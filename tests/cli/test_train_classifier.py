"""fastdiff train-classifier: what it writes and prints, interruption, bad input."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdiff.checkpoints import checkpoint, classifier_checkpoint
from fastdiff.training import classifier_trainer

SMALL = (
    "--channels", "8,16", "--attention", "none", "--layers-per-block", "1", "--batch-size", "8",
    "--threads", "1",
)  # fmt: skip
TRAIN = ("train-classifier", *SMALL, "--steps", 3)


def test_digits(run: Callable, digits_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "classifier"
    ran = run(*TRAIN, "--checkpoint", digits_run, "--data", "digits", "--out", out, "--seed", 2)
    assert ran.code == 0
    assert "1442 images of 1x8x8, 10 classes" in ran.err
    assert ran.last == f"done: {out}"
    head, *rows = ran.out.splitlines()
    assert head.split() == ["noise", "/", "signal", "right", "of", "355", "held-out", "images"]
    noise = [float(row.split()[0]) for row in rows]
    assert len(noise) == 5
    assert noise == sorted(noise, reverse=True)
    found = classifier_checkpoint.load(out)
    assert (found.step, found.seed, found.dataset) == (3, 2, "digits")
    assert found.architecture.widths == (8, 16)
    assert [f"{level.share:.1%}" for level in found.accuracy] == [row.split()[1] for row in rows]
    classifier_checkpoint.check_fits(found, checkpoint.load(digits_run))


def test_a_folder(run: Callable, plain_run: Path, pictures: Path, tmp_path: Path) -> None:
    """Four images a class: none is held out."""
    words = ("--checkpoint", plain_run, "--data", pictures, "--out", tmp_path / "new")
    ran = run(*TRAIN, *words)
    assert (ran.code, ran.out) == (0, "")
    assert "8 images of 3x8x8, 2 classes" in ran.err
    found = classifier_checkpoint.load(tmp_path / "new")
    assert (found.classes, found.accuracy) == (("cat", "dog"), ())
    assert found(torch.zeros(2, 3, 8, 8), torch.tensor(0)).shape == (2, 2)


def test_ctrl_c_keeps_what_there_is(
    run: Callable, digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = classifier_trainer.ClassifierTrainer.step

    def interrupted(trainer: classifier_trainer.ClassifierTrainer) -> float:
        if trainer.finished_steps == 1:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(classifier_trainer.ClassifierTrainer, "step", interrupted)
    out = tmp_path / "new"
    ran = run(*TRAIN, "--checkpoint", digits_run, "--data", "digits", "--out", out)
    assert ran.code == 130
    assert ran.last == f"SIGINT: stopped after step 2; classifier {out}"
    assert classifier_checkpoint.load(out).step == 2


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--checkpoint {run} --data digits", "the following arguments are required: --out"),
        ("--checkpoint {run} --out {new}", "the following arguments are required: --data"),
        ("--checkpoint {run} --data digits --out {pictures}", "{pictures} exists already"),
        ("--checkpoint {new} --data digits --out {new}", "no checkpoint at {new}: no such folder"),
        ("--checkpoint {plain} --data digits --out {new}", "images of channels 1, the model has 3"),
        ("--checkpoint {run} --data {pictures} --out {new}", "knows the classes ('cat', 'dog'),"),
        ("--checkpoint {plain} --data {pictures}/cat --out {new}", "has no sub-folders, one for"),
        ("--checkpoint {run} --data digits --out /proc/new", "cannot write /proc/new"),
        ("--checkpoint {run} --data digits --out {new} --steps 0", "steps must be at least 1"),
        ("--checkpoint {run} --data digits --out {new} --attention 3", "attention level 3 does"),
    ],
)
def test_bad_input(
    run: Callable,
    digits_run: Path,
    plain_run: Path,
    pictures: Path,
    tmp_path: Path,
    words: str,
    part: str,
) -> None:
    places = {"run": digits_run, "plain": plain_run, "pictures": pictures, "new": tmp_path / "new"}
    ran = run(*TRAIN, *words.format(**places).split())
    assert (ran.code, ran.out) == (2, "")
    assert ran.last.startswith("fastdiff: error: ")
    assert part.format(**places) in ran.last
    assert not list(tmp_path.iterdir())
