"""fastdiff average, and sampling by the name of an average."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_calls import TINY, call

from fastdiff.checkpoints import checkpoint


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with three averages."""
    out = tmp_path_factory.mktemp("runs") / "averaged"
    words = ("--steps", 4, "--save-every", 2, "--ema", "0.5", "--ema-std", "0.05,0.1")
    assert call("train", "--data", "digits", *TINY, *words, "--out", out) == 0
    return out


def test_a_length_from_snapshots(run: Callable, averaged: Path, tmp_path: Path) -> None:
    words = ("average", "--run", averaged, "--std", "0.08", "--out")
    ran = run(*words, tmp_path / "a", "--json")
    assert ran.code == 0, ran.err
    assert {**ran.json, "residual": None} == {
        "out": str(tmp_path / "a"), "step": 4, "weights": "std-0.08", "residual": None,
    }  # fmt: skip
    assert 0 < ran.json["residual"] < 0.1
    assert checkpoint.load(tmp_path / "a").weights == "std-0.08"
    ran = run(*words, tmp_path / "b", "--step", 3, "--dtype", "float16")
    assert "std-0.08 at step 3, of 8 snapshots, residual 0.0" in ran.out
    sampled = ("sample", "--checkpoint", tmp_path / "b", "--steps", 1, "--out", tmp_path / "x.png")
    assert run(*sampled).code == 0


def test_the_mean_of_checkpoints(run: Callable, averaged: Path, tmp_path: Path) -> None:
    paths = checkpoint.all_steps(averaged)
    ran = run("average", "--checkpoints", *paths, "--weights", "raw", "--out", tmp_path / "a")
    assert ran.out == f"{tmp_path}/a: mean-of-2 at step 4, of 2 checkpoints\n"
    values = [checkpoint.load(path, "raw").model.conv_in.weight for path in paths]
    found = checkpoint.load(tmp_path / "a").model.conv_in.weight
    torch.testing.assert_close(found, (values[0] + values[1]) / 2)


def test_an_average_is_sampled_and_exported_by_name(
    run: Callable, averaged: Path, tmp_path: Path
) -> None:
    words = ("sample", "--checkpoint", averaged, "--classes", 3, "--steps", 2, "--json")
    pictures = {}
    for name in ("ema-0.5", "std-0.1", "raw"):
        path = tmp_path / f"{name}.png"
        ran = run(*words, "--weights", name, "--out", path)
        assert (ran.code, ran.json["weights"]) == (0, name)
        pictures[path.read_bytes()] = name
    assert len(pictures) == 3
    ran = run("export", "--checkpoint", averaged, "--weights", "std-0.1", "--out", tmp_path / "e")
    assert ran.code == 0
    assert checkpoint.load(tmp_path / "e").weights == "std-0.1"
    ran = run(*words, "--weights", "std-0.2", "--out", tmp_path / "x.png")
    assert (ran.code, "has no weights 'std-0.2', but ema-0.5, std-0.05" in ran.last) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--run {run}", "--run needs --std"),
        ("--run {run} --std 0.5", "must lie in 0.001"),
        ("--run {run} --std 0.1 --weights raw", "--weights is for --checkpoints"),
        ("--run {tmp} --std 0.1", "has no snapshots of averages"),
        ("--checkpoints {run} --std 0.1", "--std and --step are for --run"),
        ("--checkpoints {run} --run {run}", "not allowed with argument"),
        ("", "one of the arguments --run --checkpoints is required"),
    ],
)
def test_what_is_refused(
    words: str, message: str, run: Callable, averaged: Path, tmp_path: Path
) -> None:
    given = words.format(run=averaged, tmp=tmp_path).split()
    ran = run("average", *given, "--out", tmp_path / "new")
    assert (ran.code, message in ran.last) == (2, True), ran.last
    assert not (tmp_path / "new").exists()
