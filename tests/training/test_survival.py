"""Runs that are interrupted at bad moments, on machines whose clocks and disks misbehave."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import warnings

import pytest
import torch

from fastdiff import schedules
from fastdiff.checkpoints import checkpoint, resumable
from fastdiff.common.errors import UnwritableError
from fastdiff.data.datasets import ImageSet
from fastdiff.training import Trainer, TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = ImageSet(torch.linspace(-1, 1, 5 * 64).view(5, 1, 8, 8))
OPTIONS = TrainingOptions(steps=6, batch_size=2, save_every=2, sample_every=2, keep=2)


@pytest.fixture
def trainer(tiny_unet, tmp_path):
    return Trainer(tiny_unet(), schedules.cosine(50), IMAGES, OPTIONS, out=tmp_path)


def logged(out):
    text = (out / "losses.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


def before(owner, name, action, monkeypatch):
    """Let ``action`` be called whenever ``owner.name`` is."""
    real = getattr(owner, name)

    def wrapper(*args, **options):
        action()
        return real(*args, **options)

    monkeypatch.setattr(owner, name, wrapper)


PLACES = {
    "data": lambda trainer: (trainer, "batch"),
    "step": lambda trainer: (trainer, "losses"),
    "update": lambda trainer: (trainer.optimizer, "step"),
    "checkpoint": lambda trainer: (checkpoint, "save_file"),
    "rename": lambda trainer: (os, "rename"),
    "grid": lambda trainer: (trainer, "preview"),
}


@pytest.mark.filterwarnings("ignore:fastdiff. .* never reaches noise")
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_at_any_moment_leaves_a_whole_checkpoint(
    place, which, trainer, tmp_path, monkeypatch
):
    sent = []

    def send():
        if trainer.finished_steps >= 2 and not sent:
            sent.append(trainer.finished_steps)
            os.kill(os.getpid(), which)

    owner, name = PLACES[place](trainer)
    before(owner, name, send, monkeypatch)
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert trainer.run(progress=False) == which
    assert sent == [2]
    done = trainer.finished_steps
    assert done == (3 if place in ("data", "step", "update") else 2)
    assert resumable.find(tmp_path).saved.step == done
    assert logged(tmp_path) == list(range(1, done + 1))
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if "partial" in path.name]
    after = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert after == handlers


def test_a_second_signal_while_a_checkpoint_is_written_keeps_the_one_before(
    trainer, tmp_path, monkeypatch
):
    def end(number, frame):
        raise SystemExit(128 + number)

    def send():
        if trainer.finished_steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.signal(signal.SIGTERM, end)
    try:
        before(checkpoint, "save_file", send, monkeypatch)
        with pytest.raises(SystemExit):
            trainer.run(progress=False)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert resumable.find(tmp_path).saved.step == 2


def test_a_hangup_that_is_ignored_stays_so(trainer):
    """As under nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        take_step = trainer.step

        def step():
            os.kill(os.getpid(), signal.SIGHUP)
            return take_step()

        trainer.step = step
        assert trainer.run(progress=False) is None
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_clocks_that_jump(trainer, tiny_unet, tmp_path, monkeypatch):
    """Neither the time of day nor the times of files decide anything."""
    random_times = random.Random(0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: random_times.uniform(-1e9, 4e9))
        patch.setattr(time, "time_ns", lambda: random_times.randrange(2**61))
        trainer.run(progress=False)
        for age, folder in enumerate(checkpoint.all_steps(tmp_path)):
            os.utime(folder, (1e9 - age, 1e9 - age))  # the newest seems the oldest
        resumed = Trainer.resume(tmp_path, IMAGES)
        assert resumed.finished_steps == 6
        assert checkpoint.load(tmp_path).step == 6
        resumed.run(progress=False)
    names = [path.name for path in checkpoint.all_steps(tmp_path)]
    assert names == ["step-00000004", "step-00000006"]
    assert logged(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_files_are_on_the_disk_before_their_name_is(trainer, tmp_path, monkeypatch):
    """What a machine that loses power finds is a whole checkpoint with the log that leads to it."""
    events, fsync, rename = [], os.fsync, os.rename

    def flush(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def named(source, target):
        events.append(("rename", str(source), str(target)))
        contents.append({str(path) for path in source.iterdir()})
        rename(source, target)

    contents = []
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", named)
    trainer.step()
    trainer.save()
    place = next(i for i, event in enumerate(events) if event[0] == "rename")
    _, staging, target = events[place]
    assert len(contents[0]) == 5
    assert contents[0] | {staging} <= set(events[:place])
    assert target.endswith("checkpoints/step-00000001")
    # The folder that lists the new one, and the folder that lists that, which is new too.
    assert events[place + 1 :] == [str(tmp_path / "checkpoints"), str(tmp_path)]

    events.clear()
    trainer.run(progress=False)
    log, renames = str(tmp_path / "losses.jsonl"), [e for e in events if e[0] == "rename"]
    assert len(renames) == 3  # checkpoints of steps 2, 4 and 6
    previous = 0
    for renamed in renames:
        assert log in events[previous : events.index(renamed)]
        previous = events.index(renamed)


def test_a_disk_that_stays_full_is_an_error_with_its_signal_too(trainer, tmp_path, monkeypatch):
    """SIGTERM on a full disk: there is no checkpoint to tell of, and that is said."""

    def refuse(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(UnwritableError, match="step-00000002: No space left on device"):
                trainer.run(progress=False)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert checkpoint.newest(tmp_path) is None
