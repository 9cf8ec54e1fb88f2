"""fastdiff distill: from a run to a student that is resumed, repeated and drawn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import call

from fastdiff.checkpoints import checkpoint

WORDS = ("--batch-size", "8", "--warmup", "0", "--sample-every", "0", "--threads", "1")
CASES = {
    "consistency": ("--data digits --intervals 4,8", ("consistency", 2)),
    "progressive": ("--data digits --few-steps 2", ("ddim", 2)),
    "reflow": ("--pairs 20 --pair-steps 3 --few-steps 3", ("euler", 3)),
}


@pytest.mark.parametrize("method", CASES)
def test_a_student_is_trained_resumed_and_sampled(
    run: Callable, digits_run: Path, tmp_path: Path, method: str
) -> None:
    words, taken = CASES[method]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steady = ("--lr-schedule", "constant", "--method", method, *words.split(), *WORDS)
    if method == "consistency":  # whose intervals depend on the steps that are planned
        steady = (*steady, "--intervals", "8,8")
    assert run("distill", digits_run, *steady, "--out", whole, "--steps", 2).code == 0
    assert run("distill", digits_run, *steady, "--out", parts, "--steps", 1).code == 0
    assert run("distill", "--resume", "--out", parts, "--steps", 2).code == 0
    assert (parts / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    ran = run("sample", "--checkpoint", parts, "--json", "--out", tmp_path / "grid.png")
    assert (ran.json["sampler"], ran.json["steps"]) == taken
    assert ran.json["evaluations"] == taken[1]
    found = checkpoint.load(parts)
    assert (found.objective, len(found.classes)) == (method, 10)
    again = ("distill", "--config", parts / "run.toml", "--out", tmp_path / "again")
    assert run(*again, "--steps", 1).code == 0
    assert checkpoint.load(tmp_path / "again").objective == method


def test_a_chain_of_students_and_a_teacher_that_moved(
    run: Callable, copied_run: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    words = ("--method", "progressive", "--data", "digits", *WORDS, "--steps", 1)
    assert run("distill", copied_run, *words, "--few-steps", 2, "--out", first).code == 0
    assert run("distill", first, *words, "--out", second).code == 0
    assert checkpoint.load(second).few_steps == 1
    shutil.move(first, tmp_path / "moved")
    on = ("distill", "--resume", "--out", second, "--steps", 2)
    ran = run(*on)
    assert ran.code == 2
    assert "the run's teacher is not at" in ran.last
    assert run("distill", tmp_path / "moved", *on[1:]).code == 0
    ran = run("train", "--resume", "--out", second, "--steps", 3)
    assert "was not written by fastdiff train" in ran.last


def test_consistency_training_needs_no_teacher(run: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--objective", "consistency", "--intervals", "4,8", "--image-size", 8, *WORDS)
    start = ("train", "--data", "digits", "--channels", "8,8", "--attention", "none")
    assert run(*start, *words, "--out", out, "--steps", 1).code == 0
    assert run("train", "--resume", "--out", out, "--steps", 2).code == 0
    ran = run("sample", "--checkpoint", out, "--json", "--out", tmp_path / "grid.png")
    assert (ran.json["sampler"], ran.json["steps"]) == ("consistency", 2)
    ran = run(*start, "--intervals", "4,8", "--out", tmp_path / "other")
    assert "--intervals does not belong to --objective ddpm" in ran.last
    ran = run(*start, *words, "--intervals", "4", "--out", tmp_path / "other")
    assert "--intervals takes two numbers, FIRST,LAST, got 4" in ran.last


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--method progressive --data digits", "TEACHER is missing"),
        ("TEACHER --data digits", "--method is missing"),
        ("TEACHER --method progressive", "say what to train on"),
        ("TEACHER --method reflow --data digits", "--data is for the methods that train on"),
        ("TEACHER --method reflow --validation digits", "--validation is for the methods"),
        ("TEACHER --method consistency --data digits --pairs 9", "--pairs is for reflow, not"),
        ("TEACHER --method progressive --data digits", "in how many steps the student"),
        ("nowhere --method progressive --data digits", "nowhere"),
        ("TEACHER --method consistency --data PICTURES", "the teacher has the classes"),
    ],
)
def test_wrong_words_are_refused(
    run: Callable, digits_run: Path, pictures: Path, tmp_path: Path, words: str, text: str
) -> None:
    known = {"TEACHER": digits_run, "PICTURES": pictures}
    ran = run(
        "distill", *(known.get(word, word) for word in words.split()), "--out", tmp_path / "x"
    )
    assert ran.code == 2
    assert text in ran.last
    assert not (tmp_path / "x").exists()


def test_pairs_of_other_options_are_not_taken(
    run: Callable, digits_run: Path, tmp_path: Path
) -> None:
    words = ("--method", "reflow", "--pair-steps", 3, *WORDS, "--steps", 1, "--out", tmp_path / "x")
    assert call("distill", digits_run, *words, "--pairs", 10) == 0
    shutil.rmtree(tmp_path / "x" / "checkpoints")
    ran = run("distill", digits_run, *words, "--pairs", 11)
    assert "has pairs of {'count': 10" in ran.last
