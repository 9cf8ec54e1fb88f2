"""fastdiff train: what it writes, resuming, signals, a full disk."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import TINY, call
from PIL import Image

from fastdiff import training
from fastdiff.checkpoints import checkpoint, folder
from fastdiff.data import digits
from fastdiff.ops.backend import current
from fastdiff.training.run_lock import run_lock

DIGITS = ("train", "--data", "digits", *TINY)


def losses(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


def same_weights(a: Path, b: Path) -> bool:
    states = [checkpoint.load(path).model.state_dict() for path in (a, b)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_writes_checkpoints_losses_and_grids(run: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--out", out, "--steps", 5, "--save-every", 2, "--sample-every", 2, "--keep", 2)
    ran = run(*DIGITS, *words, "--channels", "8,8")
    assert ran.code == 0
    assert ran.out == ""
    assert "1442 images of 1x8x8, 10 classes" in ran.err
    assert ran.last == f"done: {out}/checkpoints/step-00000005"
    assert [path.name for path in checkpoint.all_steps(out)] == ["step-00000004", "step-00000005"]
    assert [entry["step"] for entry in losses(out)] == [1, 2, 3, 4, 5]
    grids = sorted((out / "samples").iterdir())
    assert [path.name for path in grids] == ["step-00000002.png", "step-00000004.png"]
    assert Image.open(grids[0]).height > 10 * 64  # a row a class
    assert checkpoint.load(out).model.config.block_out_channels == (8, 8)


def test_learns_the_classes_of_a_folder(run: Callable, pictures: Path, tmp_path: Path) -> None:
    words = ("--data", pictures, "--out", tmp_path / "run", "--steps", 1, "--flip", "--grayscale")
    assert run("train", *TINY, *words).code == 0
    found = checkpoint.load(tmp_path / "run")
    assert found.classes == ("cat", "dog")
    assert found.channels == 1
    assert found.dataset == "pictures"


def test_threads_and_backend_are_applied_and_put_back(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(trainer: training.Trainer, observers: Any) -> None:
        seen.append((current(), torch.get_num_threads()))

    monkeypatch.setattr(training.Trainer, "run", look)
    words = ("--out", tmp_path / "run", "--steps", 1, "--threads", 2, "--backend", "reference")
    assert run(*DIGITS, *words).code == 0
    assert seen == [("reference", 2)]
    assert (current(), torch.get_num_threads()) == ("auto", 1)


def test_resumed_run_is_the_uninterrupted_one(run: Callable, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steady = (*DIGITS, "--lr-schedule", "constant", "--lr", "0.01", "--seed", 3)
    assert run(*steady, "--out", whole, "--steps", 6).code == 0
    assert run(*steady, "--out", parts, "--steps", 3).code == 0
    assert run("train", "--resume", "--out", parts, "--steps", 6, "--threads", 1).code == 0
    assert (parts / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    assert same_weights(parts, whole)


def test_resuming_reads_each_file_of_the_checkpoint_once(
    run: Callable, copied_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, summed = [], []
    load_file, checksum = folder.load_file, folder._checksum
    monkeypatch.setattr(folder, "load_file", lambda path: read.append(path) or load_file(path))
    monkeypatch.setattr(folder, "_checksum", lambda path: summed.append(path) or checksum(path))
    newest = checkpoint.newest(copied_run)
    assert run("train", "--resume", "--out", copied_run, "--steps", 6).code == 0
    assert summed == sorted(newest.glob("*.safetensors"))
    assert read == [newest / checkpoint.STATE]


def test_resume_takes_every_option_of_the_run(run: Callable, copied_run: Path) -> None:
    before = checkpoint.read_facts(checkpoint.newest(copied_run))
    assert run("train", "--resume", "--out", copied_run, "--steps", 8, "--keep", 1).code == 0
    after = checkpoint.read_facts(checkpoint.newest(copied_run))
    assert after["options"] == {**before["options"], "steps": 8, "keep": 1}
    changed = {"steps": 8, "keep": 1, "out": str(copied_run)}
    assert after["record"]["arguments"] == {**before["record"]["arguments"], **changed}


def test_resume_refuses_another_value_even_if_it_is_the_default(
    run: Callable, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert run(*DIGITS, "--out", out, "--steps", 1, "--lr", "0.01").code == 0
    again = ("train", "--resume", "--out", out, "--steps", 2)
    ran = run(*again, "--lr", "0.001")  # the default of the option, not of the run
    assert ran.code == 2
    assert "cannot change --lr: it has 0.01, got 0.001" in ran.last
    assert run(*again, "--lr", "0.01", "--channels", "16,32").code == 0


def test_images_may_have_moved(
    run: Callable, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their folder is recorded whole, and another is taken that has the same content."""
    here = tmp_path / "here"
    shutil.copytree(pictures, here / "old")
    monkeypatch.chdir(here)
    assert run("train", "--data", "old", "--out", "run", *TINY, "--steps", 1).code == 0
    monkeypatch.chdir(tmp_path)
    again = ("train", "--resume", "--out", here / "run", "--steps")
    assert run(*again, 2).code == 0
    (here / "old").rename(tmp_path / "new place")
    ran = run(*again, 3)
    assert ran.code == 2
    assert f"the run's images are no longer in {here}/old; give --data FOLDER" in ran.last
    ran = run(*again, 3, "--data", "new place")
    assert ran.code == 0, ran.err
    assert run(*again, 4).code == 0  # where they were last
    facts = checkpoint.read_facts(checkpoint.newest(here / "run"))
    assert facts["record"]["arguments"]["data"] == f"{tmp_path}/new place"

    name = tmp_path / "new place" / "cat" / "0.png"
    Image.open(name).rotate(90).save(name)
    ran = run(*again, 5)
    assert ran.code == 2
    assert "the run trained on other images: those of 'new place' then and of 'new pl" in ran.last


def test_resume_cuts_losses_that_the_checkpoint_has_not_seen(
    run: Callable, copied_run: Path
) -> None:
    log = copied_run / "losses.jsonl"
    log.write_text(log.read_text() + '{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert run("train", "--resume", "--out", copied_run, "--steps", 7).code == 0
    assert [entry["step"] for entry in losses(copied_run)] == [1, 2, 3, 4, 5, 6, 7]
    assert losses(copied_run)[-1]["loss"] != 1.0


def test_ctrl_c_writes_a_checkpoint_from_which_the_run_goes_on(
    run: Callable, start: Callable, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start(*DIGITS, "--out", stopped, "--steps", 80)
    deadline = time.monotonic() + 60
    while not (stopped / "losses.jsonl").is_file() or not losses_begun(stopped):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    done = len(losses(stopped))
    assert 1 <= done < 80
    assert checkpoint.newest(stopped) == checkpoint.step_folder(stopped, done)
    assert f"SIGINT: stopped after step {done}" in err
    assert err.strip().endswith(f"continue with: fastdiff train --resume --out {stopped}")
    assert run(*DIGITS, "--out", whole, "--steps", 80).code == 0
    assert run("train", "--resume", "--out", stopped).code == 0
    assert (stopped / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    assert same_weights(stopped, whole)


def losses_begun(out: Path) -> bool:
    return (out / "losses.jsonl").read_text().count("\n") >= 2


def test_sigterm_does_the_same(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training.Trainer.step

    def step_then_signal(trainer: training.Trainer) -> float:
        loss = step(trainer)
        if trainer.finished_steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(training.Trainer, "step", step_then_signal)
    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    ran = run(*DIGITS, "--out", tmp_path / "run", "--steps", 6)
    assert ran.code == 128 + signal.SIGTERM
    assert checkpoint.newest(tmp_path / "run") == checkpoint.step_folder(tmp_path / "run", 2)
    assert handlers == [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]


class ClosedTerminal(io.StringIO):
    """What is left of a terminal whose window is closed."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    flush = fileno = write  # type: ignore[assignment]


def test_a_closed_terminal_ends_the_run_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training.Trainer.step

    def step_and_hang_up(trainer: training.Trainer) -> float:
        if trainer.finished_steps == 2:
            monkeypatch.setattr(sys, "stderr", ClosedTerminal())
            signal.raise_signal(signal.SIGHUP)
        return step(trainer)

    monkeypatch.setattr(training.Trainer, "step", step_and_hang_up)
    assert call(*DIGITS, "--out", tmp_path / "run", "--steps", 6) == 128 + signal.SIGHUP
    assert checkpoint.newest(tmp_path / "run") == checkpoint.step_folder(tmp_path / "run", 3)


def test_a_folder_in_use_is_refused(run: Callable, copied_run: Path) -> None:
    refused = []

    def in_another_thread() -> None:
        refused.append(run("train", "--resume", "--out", copied_run, "--steps", 8))

    with run_lock(copied_run):
        thread = threading.Thread(target=in_another_thread)
        thread.start()
        thread.join()
    assert refused[0].code == 2
    assert f"{copied_run} is in use: process {os.getpid()} on" in refused[0].last
    assert run("train", "--resume", "--out", copied_run, "--steps", 8).code == 0


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_taken(
    run: Callable, copied_run: Path
) -> None:
    path = checkpoint.newest(copied_run) / checkpoint.STATE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"state\.safetensors is damaged.* from step-00000003"):
        ran = run("train", "--resume", "--out", copied_run)
    assert ran.code == 0
    assert "steps 3..6" in ran.err
    assert [entry["step"] for entry in losses(copied_run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("ctrl_c")
def test_second_ctrl_c_ends_at_once_without_a_checkpoint(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(trainer: training.Trainer) -> float:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second signal did not interrupt")

    monkeypatch.setattr(training.Trainer, "step", step)
    ran = run(*DIGITS, "--out", tmp_path / "run", "--steps", 6)
    assert ran.code == 130
    assert ran.last.endswith("fastdiff: interrupted")
    assert checkpoint.newest(tmp_path / "run") is None


def full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.filterwarnings("ignore:fastdiff. no line in the log")  # which is flushed as well
@pytest.mark.parametrize(
    ("owner", "name"),
    [(checkpoint, "save_file"), (os, "fsync"), (os, "rename")],
    ids=["writing", "flushing", "renaming"],
)
def test_full_disk_keeps_the_old_checkpoint(
    run: Callable, copied_run: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    old = checkpoint.all_steps(copied_run)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        ran = run("train", "--resume", "--out", copied_run, "--steps", 8)
    assert ran.code == 2
    target = checkpoint.step_folder(copied_run, 8)
    assert ran.last.endswith(
        f"fastdiff: error: cannot write the checkpoint {target}: No space left on device"
    )
    assert sorted((copied_run / "checkpoints").iterdir()) == old  # no partial folder either
    assert checkpoint.load(copied_run).step == 6
    assert run("train", "--resume", "--out", copied_run, "--steps", 8).code == 0
    assert checkpoint.load(copied_run).step == 8


def test_loss_that_is_not_finite_ends_the_run_with_its_checkpoints_kept(
    run: Callable, copied_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_of = training.Trainer.losses
    monkeypatch.setattr(training.Trainer, "losses", lambda *args: losses_of(*args) * torch.nan)
    ran = run("train", "--resume", "--out", copied_run, "--steps", 8)
    assert ran.code == 2
    assert "the loss is nan at step 7" in ran.last
    assert checkpoint.load(copied_run).step == 6


def test_a_share_of_the_images_is_held_out_to_validate(run: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--out", out, "--validation", "0.25", "--validate-every", 2)
    ran = run(*DIGITS, *words, "--steps", 3)
    assert ran.code == 0
    counts = digits("train").labels.bincount().tolist()
    assert f"{sum(n - n // 4 for n in counts)} images of 1x8x8" in ran.err
    assert ["validation_loss" in line for line in losses(out)] == [False, True, False]
    again = ("train", "--resume", "--out", out, "--steps", 4)
    ran = run(*again, "--validation", "digits")
    assert ran.code == 2
    assert "cannot change --validation: it has 0.25, got digits" in ran.last
    assert run(*again).code == 0
    assert "validation_loss" in losses(out)[3]


def test_images_to_validate_with_may_move(run: Callable, pictures: Path, tmp_path: Path) -> None:
    held_out, out = tmp_path / "held out", tmp_path / "run"
    shutil.copytree(pictures, held_out)
    words = ("--data", pictures, "--out", out, "--validation", held_out, "--validate-every", 1)
    assert run("train", *TINY, *words, "--steps", 1).code == 0
    held_out.rename(tmp_path / "moved")
    again = ("train", "--resume", "--out", out, "--steps", 2, "--validation")
    assert run(*again, held_out).code == 2
    assert run(*again, tmp_path / "moved").code == 0
    assert all("validation_loss" in line for line in losses(out))
    ran = run(*again, "digits")
    assert ran.code == 2
    assert "--validation has the classes ('0', " in ran.last


def test_loggers_that_are_not_there_are_named_before_images_are_read(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ("--data", "digits", "--out", tmp_path / "run", "--log", "wandb")
    ran = run("train", *TINY, *words, "--steps", 1)
    assert ran.code == 2
    assert "this needs the package 'wandb': pip install 'fastdiff[wandb]'" in ran.last
    assert not (tmp_path / "run").exists()
