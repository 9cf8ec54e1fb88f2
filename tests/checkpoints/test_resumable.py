"""A run whose newest checkpoint is damaged goes on from the one before."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest
import torch

from fastdiff import schedules
from fastdiff.checkpoints import checkpoint, resumable
from fastdiff.common.errors import CheckpointError, DamagedError, InputError, LockedError
from fastdiff.data.datasets import ImageSet
from fastdiff.training import Trainer, TrainingOptions
from fastdiff.training.run_lock import run_lock

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = ImageSet(torch.linspace(-1, 1, 5 * 64).view(5, 1, 8, 8))
OPTIONS = TrainingOptions(steps=6, batch_size=2, save_every=2, sample_every=0, keep=3)


@pytest.fixture
def out(tiny_unet, tmp_path):
    """A finished run with checkpoints of steps 2, 4 and 6."""
    Trainer(tiny_unet(), schedules.cosine(50), IMAGES, OPTIONS, out=tmp_path).run(progress=False)
    return tmp_path


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "bit": (flip_a_bit, checkpoint.STATE, "is damaged: its SHA-256 is"),
    "bit of the average": (flip_a_bit, checkpoint.WEIGHTS, "is damaged: its SHA-256 is"),
    "truncated": (truncate, checkpoint.STATE, "is damaged: its SHA-256 is"),
    "truncated facts": (truncate, checkpoint.TRAINING, "training.json"),
    "truncated description": (truncate, checkpoint.META, "fastdiff.json"),
    "lost": (lambda path: path.unlink(), checkpoint.WEIGHTS, "cannot read .*No such file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_whole_checkpoint_is_taken(kind, out, tmp_path):
    """And the end is what it was: the damaged steps are made again, with their checkpoint."""
    damage, name, told = DAMAGE[kind]
    path = checkpoint.newest(out) / name
    files = {file.name: file.read_bytes() for file in checkpoint.newest(out).iterdir()}
    losses = (out / "losses.jsonl").read_text()
    damage(path)
    with pytest.warns(UserWarning, match=rf"{told}.*; going on from step-00000004$") as warned:
        trainer = Trainer.resume(out, IMAGES)
    assert len(warned) == 1
    assert trainer.finished_steps == 4
    assert (out / "checkpoints" / "step-00000006.damaged").is_dir()
    trainer.run(progress=False)
    assert {f.name: f.read_bytes() for f in checkpoint.newest(out).iterdir()} == files
    assert (out / "losses.jsonl").read_text() == losses


def test_several_damaged_checkpoints(out):
    for step in (4, 6):
        flip_a_bit(checkpoint.step_folder(out, step) / checkpoint.STATE)
    with pytest.warns(UserWarning, match="going on from step-00000002") as warned:
        found = resumable.find(out)
    assert [path.name[-1] for path in found.damaged] == ["6", "4"]
    assert len(warned) == 2
    flip_a_bit(checkpoint.step_folder(out, 2) / checkpoint.STATE)
    with pytest.raises(DamagedError, match=r"step-00000006.*is damaged"):
        resumable.find(out)
    resumable.set_aside([checkpoint.step_folder(out, 6)])
    checkpoint.step_folder(out, 4).rename(checkpoint.step_folder(out, 6))
    resumable.set_aside([checkpoint.step_folder(out, 6)])
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000006.damaged", "step-00000006.damaged1"]


def test_what_another_version_has_written_is_not_damaged(out):
    path = checkpoint.newest(out) / checkpoint.TRAINING
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99; this fastdiff reads format 1"):
        resumable.find(out)


def test_checkpoints_without_checksums_are_taken(out):
    """As of versions that recorded none."""
    path = checkpoint.newest(out) / checkpoint.TRAINING
    facts = json.loads(path.read_text())
    assert set(facts.pop(checkpoint.CHECKSUMS)) == {checkpoint.STATE, checkpoint.WEIGHTS}
    path.write_text(json.dumps(facts))
    assert Trainer.resume(out, IMAGES).finished_steps == 6


def test_another_process_is_not_disturbed(out):
    """Neither by a process that resumes at a damaged checkpoint nor by one that was overtaken."""
    longer = dataclasses.replace(OPTIONS, steps=8)
    late, first = (Trainer.resume(out, IMAGES, longer) for _ in range(2))
    first.run(progress=False)
    with pytest.raises(
        InputError, match=r"taken the run .* to step-00000008, this one is at step 6"
    ):
        late.run(progress=False)

    refused = []

    def run():
        try:
            first.run(progress=False)
        except LockedError as error:
            refused.append(error)

    with run_lock(out):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_what_a_killed_process_has_left_is_deleted_first(out):
    """It may be what fills the disk."""
    part = out / "checkpoints" / ".step-00000008.123.partial"
    part.mkdir()
    trainer = Trainer.resume(out, IMAGES, dataclasses.replace(OPTIONS, steps=7))
    trainer.step = lambda: pytest.fail("is still there") if part.exists() else 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run(progress=False)
