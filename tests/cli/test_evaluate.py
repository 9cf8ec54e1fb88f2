"""fastdiff eval: its figures are those of fastdiff.evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiff import samplers
from fastdiff.checkpoints import checkpoint
from fastdiff.evaluation import evaluate

QUICK = ("--samples", 100, "--steps", 2, "--threads", 1)


@pytest.fixture
def words(digits_run: Path) -> tuple[object, ...]:
    return ("eval", "--checkpoint", digits_run, *QUICK)


def test_json_holds_the_figures(run: Callable, words: tuple, digits_run: Path) -> None:
    ran = run(*words, "--sampler", "ddpm", "--seed", 3, "--json")
    assert ran.code == 0
    assert "generating digits" in ran.err  # the progress bar
    found = checkpoint.load(digits_run)
    sampler = samplers.DDPM(found.forward, 2, prediction=found.prediction)
    expected = evaluate(found, sampler, samples=100, seed=3, progress=False).as_dict()
    facts = ran.json
    assert facts.pop("seconds") > 0
    del expected["seconds"]
    assert {name: facts.pop(name) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert facts.pop("backend") in ("reference", "cpu")
    assert isinstance(facts.pop("isa"), str)
    assert facts == {
        "checkpoint": str(checkpoint.newest(digits_run)),
        "weights": "ema-0.999",
        "sampler": "ddpm",
        "steps": 2,
        "guidance": 1.0,
        "classifier": None,
        "classifier_scale": None,
        "guidance_mode": "cfg",
        "guidance_options": {},
        "autoguidance": None,
        "perturb": None,
        "seed": 3,
        "threads": 1,
    }


def test_table_puts_generated_beside_real(run: Callable, words: tuple) -> None:
    facts = run(*words, "--json").json
    head, *rows, last = run(*words).out.splitlines()
    assert head.split() == ["generated", "held-out", "real"]
    shown = [[float(number) for number in row.split()[-2:]] for row in rows]
    figures = ("accuracy", "frechet", "nearest_train_median", "nearest_train_min")
    expected = [[facts[name], facts[f"{name}_real"]] for name in figures]
    for row, wanted in zip(shown, expected, strict=True):
        assert row == pytest.approx(wanted, abs=6e-4, rel=1e-4)
    assert last.startswith("100 digits, ddim, 2 steps, 2 evaluations an image, seed 0, in ")
