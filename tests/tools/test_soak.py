"""The soak itself: a short one passes, and what it is to find it finds."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff import schedules
from fastdiff.checkpoints import checkpoint
from fastdiff.data.datasets import ImageSet
from fastdiff.training import Trainer, TrainingOptions
from tools.soak import interruptions
from tools.soak.__main__ import Soak
from tools.soak.command import Command, write_images
from tools.soak.interruptions import FailedError
from tools.soak.judging import LOSSES, check_end, check_progress


def test_a_short_soak(tmp_path, monkeypatch):
    """Each process takes seconds to start, so these are few."""
    write_images(tmp_path / "images")
    short = Soak(Command(tmp_path / "images", 40), tmp_path, seed=0)
    kinds = iter([interruptions.intrude, interruptions.fill_disk, interruptions.kill])
    monkeypatch.setattr(short, "_choose", lambda: next(kinds))
    short.train_whole()
    short.go_on(1, until=float("inf"))
    assert short.failed == 0
    assert short.passed >= 4  # and the end, of which there are more if a run is done before a kill


@pytest.fixture
def runs(tiny_unet, tmp_path):
    """Twice the same run of four steps."""
    images = ImageSet(torch.linspace(-1, 1, 5 * 64).view(5, 1, 8, 8))
    options = TrainingOptions(steps=4, batch_size=2, save_every=2, sample_every=0, keep=2)
    whole = tmp_path / "whole"
    trainer = Trainer(tiny_unet(), schedules.cosine(50), images, options, out=whole)
    trainer.run(progress=False)
    return shutil.copytree(whole, tmp_path / "out"), whole


def change_tensor(out):
    path = checkpoint.newest(out) / checkpoint.STATE
    tensors = load_file(path)
    tensors["exp_avg.conv_in.bias"].view(torch.int32)[0] ^= 1
    save_file(tensors, path)


def change_fact(out):
    path = checkpoint.newest(out) / checkpoint.TRAINING
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 5}))


def lose_line(out):
    lines = (out / LOSSES).read_text().splitlines()
    (out / LOSSES).write_text("\n".join([lines[0], *lines[2:]]) + "\n")


def repeat_line(out):
    lines = (out / LOSSES).read_text().splitlines()
    (out / LOSSES).write_text("\n".join([*lines[:2], *lines[1:]]) + "\n")


DAMAGE = {
    "a bit of a moment": (change_tensor, "1 of .* tensors of training_state.* differ|is damaged"),
    "a fact": (change_fact, r"training\.json differs"),
    "a line": (lose_line, r"losses\.jsonl differs"),
    "a line twice": (repeat_line, r"losses\.jsonl differs"),
    "a checkpoint": (lambda out: shutil.rmtree(checkpoint.newest(out)), "it was that of 4|last ch"),
    "a part": (lambda out: (out / "checkpoints/.step-9.partial").mkdir(), "parts of checkpoints"),
}


def test_a_run_that_lost_nothing_passes(runs):
    assert check_progress(*runs, 2) == 4
    check_end(*runs)


@pytest.mark.parametrize("lost", DAMAGE)
def test_a_run_that_lost_something_fails(lost, runs):
    damage, told = DAMAGE[lost]
    damage(runs[0])
    with pytest.raises(FailedError, match=told):
        check_end(*runs)
    if lost not in ("a fact", "a part"):  # which are judged at the end alone
        with pytest.raises(FailedError, match=told):
            check_progress(*runs, 4)
