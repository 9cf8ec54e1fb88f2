"""Observers of a training run: what they are told, in which order, and what their errors do."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

from fastdiff import schedules
from fastdiff.data.datasets import ImageSet
from fastdiff.training import Trainer, TrainingOptions
from fastdiff.training.observers import Observer, Observers, RunStart, StepRecord
from fastdiff.training.run_logs import SpeedLog
from fastdiff.training.session import Dispensable
from fastdiff.training.training_bar import MovingAverage

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = TrainingOptions(steps=4, batch_size=3, warmup=0, save_every=2, sample_every=3, seed=1)


class Recorder(Observer):
    """Notes what it is told, and fails at one event."""

    product = "record"

    def __init__(self, failing: str = "", error: Exception | None = None, foreign: bool = False):
        self.told: list[str] = []
        self.records: list[StepRecord] = []
        self.failing, self.error, self.foreign = failing, error, foreign

    def note(self, event: str) -> None:
        self.told.append(event)
        if self.error is not None and event.startswith(self.failing):
            raise self.error

    def begin(self, start: RunStart) -> None:
        self.start = start
        self.note(f"begin {start.finished_steps}")

    def step(self, record: StepRecord) -> None:
        self.records.append(record)
        self.note(f"step {record.step}")

    def grid(self, step: int, picture: object) -> None:
        self.note(f"grid {step}")

    def checkpoint(self, step: int) -> None:
        self.note(f"checkpoint {step}")

    def end(self) -> None:
        self.note("end")


@pytest.fixture
def images(generator) -> ImageSet:
    return ImageSet(torch.randint(256, (7, 1, 8, 8), generator=generator, dtype=torch.uint8))


@pytest.fixture
def make_trainer(tiny_unet, images):
    def make(out=None, **changes):
        options = dataclasses.replace(OPTIONS, **changes)
        return Trainer(tiny_unet(), schedules.cosine(50), images, options, prediction="v", out=out)

    return make


def test_an_observer_is_told_of_everything_in_order(make_trainer, images, tmp_path):
    seen = Recorder()
    make_trainer(tmp_path).run(progress=False, observers=[seen])
    assert seen.told == [
        "begin 0", "step 1", "step 2", "checkpoint 2", "step 3", "grid 3", "step 4", "checkpoint 4",
        "end",
    ]  # fmt: skip
    assert seen.start.facts["images"] == {
        "name": "", "count": 7, "shape": [1, 8, 8], "classes": 0, "validation": 0
    }  # fmt: skip
    again = Recorder()
    options = dataclasses.replace(OPTIONS, steps=5)
    Trainer.resume(tmp_path, images, options).run(progress=False, observers=[again])
    assert again.told == ["begin 4", "step 5", "checkpoint 5", "end"]


def test_a_record_has_what_the_step_computed_and_took(make_trainer, monkeypatch):
    """Reading the images is made to take 30 of at least 30 ms."""
    trainer, seen = make_trainer(steps=1), Recorder()
    read = trainer.batch
    monkeypatch.setattr(trainer, "batch", lambda draws: (time.sleep(0.03), read(draws))[1])
    trainer.run(progress=False, observers=[seen])
    (record,) = seen.records
    assert set(record.values) == {"loss", "lr", "gradient_norm"}
    assert record.values["lr"] == trainer.learning_rate(0)
    assert record.values["gradient_norm"] == trainer.gradient_norm > 0
    assert 0.03 <= record.waited < record.seconds < 60
    assert record.speed["images_per_second"] == pytest.approx(3 / record.seconds)
    assert record.speed["data_wait_share"] == pytest.approx(record.waited / record.seconds)
    assert 0.01 < record.speed["memory_gib"] < 1000
    assert "device_memory_gib" not in record.speed


def test_grids_are_drawn_only_for_one_who_looks(make_trainer):
    class OnlySteps(Observer):
        pass

    trainer, drawn = make_trainer(), []
    preview = trainer.preview
    trainer.preview = lambda: drawn.append(1) or preview()
    trainer.run(progress=False, observers=[OnlySteps()])
    assert not drawn
    trainer.options = dataclasses.replace(trainer.options, steps=6)
    trainer.run(progress=False, observers=[Recorder()])
    assert drawn == [1]


def test_the_end_is_told_after_an_error(make_trainer):
    trainer, seen = make_trainer(), Recorder()
    weight = trainer.model.conv_in.weight
    trainer.losses = lambda batch: weight.sum().expand(len(batch.x0)) * torch.nan
    with pytest.raises(ValueError, match="loss is nan"):
        trainer.run(progress=False, observers=[seen])
    assert seen.told == ["begin 0", "step 1", "end"]
    assert seen.records[0].refusal is not None


def test_a_foreign_observer_never_ends_a_run_and_is_dropped(make_trainer):
    """Whatever it raises, even what in one's own code would be a bug; others are told on."""
    broken = Recorder("step 2", KeyError("inside"), foreign=True)
    broken.product, seen = "broken log", Recorder()
    with pytest.warns(UserWarning, match="no broken log: 'inside'; training goes on") as told:
        make_trainer().run(progress=False, observers=[broken, seen])
    assert len(told) == 1
    assert broken.told == ["begin 0", "step 1", "step 2"]
    assert seen.told[-1] == "end"


def test_a_foreign_observer_may_fail_to_begin(make_trainer):
    broken = Recorder("begin", RuntimeError(), foreign=True)
    with pytest.warns(UserWarning, match="no record: RuntimeError; training goes on"):
        make_trainer(steps=1).run(progress=False, observers=[broken])
    assert broken.told == ["begin 0"]


def test_a_bug_of_an_own_observer_is_raised(make_trainer):
    broken, seen = Recorder("step 1", KeyError("a bug")), Recorder()
    with pytest.raises(KeyError, match="a bug"):
        make_trainer().run(progress=False, observers=[seen, broken])
    assert seen.told == ["begin 0", "step 1", "end"]


def test_a_file_error_of_an_own_observer_is_told_once_and_tried_again(make_trainer):
    broken = Recorder("step", OSError("no space"))
    with pytest.warns(UserWarning, match="no record: no space") as told:
        make_trainer().run(progress=False, observers=[broken])
    assert len(told) == 1
    assert broken.told.count("step 4") == 1


def test_the_losses_have_the_norm_and_the_speed_is_a_file_of_its_own(
    make_trainer, images, tmp_path
):
    make_trainer(tmp_path, steps=3).run(progress=False)
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [sorted(line) for line in lines] == [["gradient_norm", "loss", "lr", "step"]] * 3
    speed = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [(line["step"], line["steps"], line["images"]) for line in speed] == [
        (2, 2, 6), (3, 1, 3)
    ]  # fmt: skip
    assert all(0 < line["waited"] < line["seconds"] for line in speed)
    options = dataclasses.replace(OPTIONS, steps=4)
    Trainer.resume(tmp_path, images, options).run(progress=False)
    sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [session["step"] for session in sessions] == [0, 3]
    assert sessions[0]["torch"] == torch.__version__
    assert sessions[1]["options"]["steps"] == 4


def test_the_speed_of_lost_steps_is_forgotten(tmp_path):
    log = SpeedLog(tmp_path)
    log.begin(RunStart(tmp_path, 0, 9, {}))
    for step in (1, 2, 3):
        log.step(StepRecord(step, {}, 4, 7.0, 0.5, 1 << 20, 1 << 21))
    log.end()
    path = tmp_path / "speed.jsonl"
    first = {
        "step": 2, "steps": 2, "images": 8, "seconds": 14.0, "waited": 1.0, "memory": 1 << 20,
        "device_memory": 1 << 21,
    }  # fmt: skip
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        first, {**first, "step": 3, "steps": 1, "images": 4, "seconds": 7.0, "waited": 0.5}
    ]  # fmt: skip
    log.begin(RunStart(tmp_path, 2, 9, {}))
    assert len(path.read_text().splitlines()) == 1


def test_a_moving_average():
    average = MovingAverage()
    assert average.value == 0
    average.add(3.0)
    assert average.value == 3
    average.add(float("nan"))
    average.add(5.0, 2.0)
    assert average.value == pytest.approx((0.98 * 3 + 2 * 5) / (0.98 + 2))


def test_watching_ends_whoever_was_asked_to_begin():
    first, second = Recorder(), Recorder("begin", OSError("cannot"))
    third = Recorder()
    watchers = Observers([first, second, third], Dispensable())
    with pytest.raises(OSError, match="cannot"), watchers.watching(RunStart(None, 0, 1, {})):
        pytest.fail("it must not begin")
    assert (first.told[-1], second.told[-1], third.told) == ("end", "end", [])
