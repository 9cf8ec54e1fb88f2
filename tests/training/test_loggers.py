"""Loggers of other packages: what they are told, that a resumed run goes on in the same log.

TensorBoard's event files are read back, where that package is installed. Of wandb and trackio there
are stand-ins with the signatures of wandb 0.31 and trackio 0.43.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import schedules
from fastdiff.common.errors import InputError
from fastdiff.data.datasets import ImageSet
from fastdiff.training import Trainer, TrainingOptions
from fastdiff.training.loggers import LOGGERS, identify, scalars
from fastdiff.training.observers import StepRecord

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = TrainingOptions(
    steps=4, batch_size=3, warmup=0, save_every=2, sample_every=2, validate_every=4, seed=1
)


class StandIn(ModuleType):
    """A module of a logger that notes its calls; ``fails`` is the name of one that raises."""

    def __init__(self, name: str, fails: str = "") -> None:
        super().__init__(name)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails = fails

    def note(self, call: str, **arguments: Any) -> None:
        self.calls.append((call, arguments))
        if call == self.fails:
            raise ConnectionResetError("no network")

    def of(self, call: str) -> list[dict[str, Any]]:
        return [arguments for name, arguments in self.calls if name == call]


def wandb_stand_in(fails: str = "") -> StandIn:
    module = StandIn("wandb", fails)

    def init(
        entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None,
        config=None, config_exclude_keys=None, config_include_keys=None, allow_val_change=None,
        group=None, job_type=None, mode=None, force=None, reinit=None, resume=None,
        resume_from=None, fork_from=None, save_code=None, tensorboard=None, sync_tensorboard=None,
        monitor_gym=None, settings=None, anonymous=None,
    ):  # fmt: skip
        module.note(
            "init", project=project, dir=dir, id=id, name=name, config=config, resume=resume
        )
        return SimpleNamespace(
            log=lambda data, step=None, commit=None: module.note("log", data=data, step=step),
            finish=lambda exit_code=None: module.note("finish"),
        )

    module.init = init
    module.Image = lambda data_or_path, mode=None, caption=None: ("image", data_or_path.size)
    return module


def trackio_stand_in(fails: str = "") -> StandIn:
    module = StandIn("trackio", fails)

    def init(
        project, name=None, group=None, space_id=None, server_url=None, dataset_id=None,
        bucket_id=None, config=None, resume="never", settings=None, private=None, embed=True,
        auto_log_gpu=None, gpu_log_interval=10.0, auto_log_cpu=None, cpu_log_interval=10.0,
        webhook_url=None, webhook_min_level=None,
    ):  # fmt: skip
        module.note("init", project=project, name=name, config=config, resume=resume)

    module.init = init
    module.log = lambda metrics, step=None: module.note("log", data=metrics, step=step)
    module.finish = lambda: module.note("finish")
    module.Image = lambda value, caption=None: ("image", value.size)
    return module


STAND_INS = {"wandb": wandb_stand_in, "trackio": trackio_stand_in}


@pytest.fixture
def images(generator) -> ImageSet:
    return ImageSet(torch.randint(256, (7, 1, 8, 8), generator=generator, dtype=torch.uint8))


@pytest.fixture
def make_trainer(tiny_unet, images):
    def make(out, **changes):
        options = dataclasses.replace(OPTIONS, **changes)
        return Trainer(
            tiny_unet(), schedules.cosine(50), images, options, prediction="v", validation=images,
            out=out,
        )  # fmt: skip

    return make


def test_values_have_titles_and_are_finite():
    values = {
        "loss": float("nan"), "lr": 0.5, "validation_loss": 2, "validation_loss_parts": [3.0, 4.0],
        "other": 7, "text": "no",
    }  # fmt: skip
    found = scalars(StepRecord(1, values, 8, 2.0, 0.5, 2**30, 2**31))
    assert found == {
        "train/learning_rate": 0.5, "validation/loss": 2, "validation/loss_parts_0": 3,
        "validation/loss_parts_1": 4, "train/other": 7, "speed/images_per_second": 4,
        "speed/seconds_per_step": 2, "speed/data_wait_share": 0.25, "speed/memory_gib": 1,
        "speed/device_memory_gib": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", STAND_INS)
def test_a_logger_gets_scalars_and_grids_and_goes_on(
    name, make_trainer, images, tmp_path, monkeypatch
):
    module = STAND_INS[name]()
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "digits")
    out = tmp_path / "a run"
    make_trainer(out).run(progress=False, observers=[LOGGERS[name]()])
    (begun,) = module.of("init")
    assert (begun["project"], begun["resume"]) == ("digits", "allow")
    assert begun["config"]["options"]["batch_size"] == 3
    steps = [call["step"] for call in module.of("log")]
    assert steps == [1, 2, 2, 3, 4, 4]  # the second of a step is its grid
    assert module.of("log")[2]["data"]["samples"][0] == "image"
    last = module.of("log")[4]["data"]
    line = json.loads((out / "losses.jsonl").read_text().splitlines()[-1])
    assert last["train/loss"] == line["loss"]
    assert last["validation/loss"] == line["validation_loss"]
    assert last["train/gradient_norm"] == line["gradient_norm"]
    assert last["speed/images_per_second"] > 0
    assert module.calls[-1][0] == "finish"

    options = dataclasses.replace(OPTIONS, steps=5)
    resumed = Trainer.resume(out, images, options, validation=images)
    resumed.run(progress=False, observers=[LOGGERS[name]()])
    again = module.of("init")[1]
    assert {key: again[key] for key in ("id", "name") if key in again} == {
        key: begun[key] for key in ("id", "name") if key in begun
    }
    assert module.of("log")[-1]["step"] == 5
    other = make_trainer(tmp_path / "b" / "a run", steps=1)
    other.run(progress=False, observers=[LOGGERS[name]()])
    key = "id" if name == "wandb" else "name"
    assert module.of("init")[2][key] != begun[key]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
@pytest.mark.parametrize("name", STAND_INS)
def test_a_logger_that_fails_does_not_end_the_run(name, call, make_trainer, tmp_path, monkeypatch):
    module = STAND_INS[name](call)
    monkeypatch.setitem(sys.modules, name, module)
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match="no log of .*: no network; training goes on"):
        assert trainer.run(progress=False, observers=[LOGGERS[name]()]) is None
    assert trainer.finished_steps == 4
    assert len(module.of(call)) == 1


@pytest.mark.parametrize("name", LOGGERS)
def test_a_package_that_is_missing_is_named_before_the_run(name, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(InputError, match=rf"package '{name}': pip install 'fastdiff\[{name}\]'"):
        LOGGERS[name]()


def test_the_identity_of_a_run_is_kept(tmp_path):
    name, first = identify(tmp_path)
    assert name == tmp_path.name
    assert identify(tmp_path) == (name, first)
    assert identify(None)[1] != identify(None)[1]


def test_tensorboard_has_each_step_once(make_trainer, images, tmp_path):
    """Steps that a run has done twice too, since it was killed after a checkpoint."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, steps=3)
    save, trainer.save = trainer.save, lambda: trainer.finished_steps == 2 and save()
    trainer.run(progress=False, observers=[LOGGERS["tensorboard"]()])
    assert trainer.finished_steps == 3  # and the checkpoint is of step 2
    resumed = Trainer.resume(tmp_path, images, OPTIONS, validation=images)
    assert resumed.finished_steps == 2
    resumed.run(progress=False, observers=[LOGGERS["tensorboard"]()])

    log = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    log.Reload()
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    events = log.Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4]
    assert np.allclose([e.value for e in events], [line["loss"] for line in lines], rtol=1e-6)
    (validation,) = log.Scalars("validation/loss")
    assert validation.step == 4
    assert {"train/learning_rate", "speed/images_per_second", "validation/loss_parts_3"} <= set(
        log.Tags()["scalars"]
    )
    assert [event.step for event in log.Images("samples")] == [2, 4]
