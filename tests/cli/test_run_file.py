"""A run's options in a file: what is written, read, refused, and that it repeats the run."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import TINY

from fastdiff.checkpoints import checkpoint
from fastdiff.cli import run_file, train
from fastdiff.common import toml_file
from fastdiff.common.errors import InputError
from fastdiff.training import TrainingOptions


@pytest.fixture
def command() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser


def read(command: argparse.ArgumentParser, folder: Path, text: str) -> dict:
    (folder / "given.toml").write_text(text, encoding="utf-8")
    return run_file.read(command, folder / "given.toml")


def test_every_option_has_a_key(command: argparse.ArgumentParser) -> None:
    known = run_file.keys(command)
    named = {action.dest for action in command._actions} - {"help", *run_file.CONTROLS}
    assert {action.dest for action in known.values()} == named
    assert set(TrainingOptions.__dataclass_fields__) <= named
    assert all(re.fullmatch(r"[a-z_]+\.[a-z0-9_]+", key) for key in known)


def test_what_is_written_is_read(command: argparse.ArgumentParser, tmp_path: Path) -> None:
    words = [
        "--data", 'a "b" \\ é\x7f', "--out", "runs/x", "--channels", "8,16", "--attention", "none",
        "--lr", "1e-05", "--value-range", "0", "4095", "--no-compile", "--flip", "--threads", "2",
    ]  # fmt: skip
    args = command.parse_args(words)
    run_file.write(command, args, tmp_path / "run.toml", "train")
    found = run_file.read(command, tmp_path / "run.toml")
    wanted = {k: v for k, v in vars(args).items() if v is not None}
    wanted = {k: v for k, v in wanted.items() if k not in (*run_file.CONTROLS, "out")}
    assert found == {**wanted, "channels": (8, 16), "attention": ()}
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    text = (tmp_path / "run.toml").read_text("utf-8")
    assert "# height and width\nimage_size = 16\n" in text
    assert "# out =\n" in text
    assert "# sde =\n" in text
    assert max(map(len, text.splitlines())) <= 100


def test_text_that_toml_cannot_hold_is_left_out() -> None:
    assert toml_file.entry("data", "a\udcff") == "# data ="
    assert toml_file.entry("data", ["a", "\udcff"]) == "# data ="


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nstep = 3", "no option has the key training.step; the nearest is tra.*steps"),
        ("[model]\nlr = 3", "no option has the key model.lr; the nearest is optimizer.lr"),
        ("lr = 3", "no option has the key lr; the nearest is optimizer.lr"),
        ("[run]\nresume = true", "no option has the key run.resume"),
        ("[trainings]\nsteps = 3", "no option has the key trainings.steps"),
        ("[training]\nsteps = 3.5", "training.steps must be an integer, got 3.5"),
        ("[training]\nsteps = true", "training.steps must be an integer, got True"),
        ("[training]\nbf16 = 1", "training.bf16 must be true or false, got 1"),
        ('[optimizer]\nlr = "0.1"', "optimizer.lr must be a number, got '0.1'"),
        ('[model]\nchannels = "32,64"', "model.channels must be an integer, or an array of such"),
        ("[model]\nchannels = [32, 6.4]", "model.channels must be an integer, or an array"),
        ("[model]\nlayers_per_block = 0", "layers_per_block: must be at least 1, got 0"),
        ("[data]\nvalue_range = [0]", "data.value_range must be 2 values, got 1"),
        ("[data]\ndata = 3", "data.data must be a string, got 3"),
        ('[objective]\nobjective = "gan"', "objective.objective must be one of ddpm, .* 'gan'"),
        ("[training]\nsteps = 3\nsteps = 4", "given.toml is not TOML"),
        ("[training", "given.toml is not TOML"),
    ],
)
def test_what_is_refused(
    text: str, message: str, command: argparse.ArgumentParser, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"given\.toml.*{message}|{message}"):
        read(command, tmp_path, text)


def test_single_options(command: argparse.ArgumentParser) -> None:
    texts = ["model.channels=32,64", "model.attention=none", "data.flip=true", "optimizer.lr=1e-4"]
    texts += ["data.value_range=0,4095", "training.compile=false", "data.data=a=b", "run.keep=3"]
    assert run_file.assigned(command, texts) == {
        "channels": (32, 64), "attention": (), "flip": True, "lr": 1e-4,
        "value_range": [0.0, 4095.0], "compile": False, "data": "a=b", "keep": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.channels", "--set must be TABLE.KEY=VALUE, got 'model.channels'"),
        ("channels=32", "--set: no option has the key channels; the nearest is model.channels"),
        ("model.channels=a", "--set model.channels must be an integer, got 'a'"),
        ("data.flip=yes", "--set data.flip must be true or false, got 'yes'"),
        ("training.steps=", "--set training.steps must be an integer, got ''"),
    ],
)
def test_single_options_that_are_refused(
    text: str, message: str, command: argparse.ArgumentParser
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        run_file.assigned(command, [text])


def test_a_file_repeats_a_run(run: Callable, tmp_path: Path) -> None:
    """To bits, with options of every table; and it is resumed by the file, too."""
    first, again = tmp_path / "first", tmp_path / "again"
    words = ("--lr", "0.01", "--ema", "0.5", "--objective", "dsm", "--seed", 3, "--steps", 3)
    assert run("train", "--data", "digits", *TINY, *words, "--out", first).code == 0
    assert run("train", "--config", first / "run.toml", "--out", again).code == 0
    files = [checkpoint.newest(out) / checkpoint.STATE for out in (first, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (first / "losses.jsonl").read_text() == (again / "losses.jsonl").read_text()
    assert (first / "run.toml").read_text() == (again / "run.toml").read_text()

    resumed = ("train", "--resume", "--config", first / "run.toml", "--out", again)
    assert run(*resumed, "--set", "training.steps=4").code == 0
    assert "steps = 4\n" in (again / "run.toml").read_text()
    ran = run(*resumed, "--set", "optimizer.lr=0.1")
    assert (ran.code, "cannot change --lr: it has 0.01, got 0.1" in ran.last) == (2, True)


def test_the_command_line_comes_first(run: Callable, tmp_path: Path) -> None:
    given = tmp_path / "given.toml"
    given.write_text(
        f'[run]\nout = {json.dumps(str(tmp_path / "here"))}\n[data]\ndata = "digits"\n'
        "[optimizer]\nlr = 0.1\nwarmup = 7\n[training]\nbatch_size = 4\n"
    )
    words = ("--set", "optimizer.lr=0.2", "--set", "optimizer.warmup=8", "--lr", "0.3")
    ran = run("train", *TINY, "--warmup", 9, "--config", given, *words, "--steps", 1)
    assert ran.code == 0, ran.err
    options = checkpoint.read_facts(checkpoint.newest(tmp_path / "here"))["options"]
    assert (options["lr"], options["warmup"], options["batch_size"]) == (0.3, 9, 8)


def test_a_file_that_is_not_there(run: Callable, tmp_path: Path) -> None:
    ran = run("train", "--config", tmp_path / "none.toml", "--out", tmp_path / "run")
    assert ran.code == 2
    assert "none.toml" in ran.last
