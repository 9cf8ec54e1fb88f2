"""Losses and gradients that would spoil a run: it stops, or leaves the step out, and says why."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import pytest
import torch

from fastdiff import schedules
from fastdiff.checkpoints import checkpoint
from fastdiff.common.errors import CheckpointError, InputError, TrainingError
from fastdiff.data.datasets import ImageSet
from fastdiff.training import loss_guard
from fastdiff.training.loss_guard import LossGuard
from fastdiff.training.trainer import Trainer
from fastdiff.training.training_options import TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")

BAD = 9  # number of the damaged image of twelve
OPTIONS = TrainingOptions(
    steps=6, batch_size=4, lr=1e-3, warmup=0, save_every=2, sample_every=0, on_bad_loss="skip"
)


@pytest.fixture
def images(generator):
    return ImageSet(torch.rand(12, 1, 8, 8, generator=generator) * 2 - 1)


@pytest.fixture
def make_trainer(tiny_unet, images):
    def make(out=None, data=images, **changes):
        options = dataclasses.replace(OPTIONS, **changes)
        model = tiny_unet(dropout=0.3)
        return Trainer(model, schedules.cosine(50), data, options, prediction="v", out=out)

    return make


def lines(out):
    text = (out / "losses.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def state_of(trainer):
    """Copies of all that an update changes."""
    tensors = [*trainer.model.state_dict().values(), *trainer.ema.state_dict().values()]
    for parameter in trainer.parameters:
        state = trainer.optimizer.state[parameter]
        tensors += [state[key] for key in sorted(state)]
    return [tensor.clone() for tensor in tensors]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def spoil(images, value):
    """The same images, in which a value of one is replaced after all checks, as by bad memory."""
    pixels = images.images.clone()
    spoilt = dataclasses.replace(images, images=pixels)
    pixels[BAD, 0, 3, 3] = value
    return spoilt


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_damaged_image_is_left_out_and_the_image_named(
    value, make_trainer, images, tmp_path
):
    """Steps 1 to 3 are an epoch, so the image comes once in it; nothing of its step is kept."""
    trainer = make_trainer(tmp_path, data=spoil(images, value), steps=3)
    take_step, changed = trainer.step, []

    def step():
        before = state_of(trainer)
        loss = take_step()
        changed.append(len(before) != len(state_of(trainer)) or not same(before, state_of(trainer)))
        return loss

    trainer.step = step
    told = rf"the loss is nan at step \d, which is left out: in image {BAD}$"
    with pytest.warns(UserWarning, match=told):
        assert trainer.run(progress=False) is None
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3]
    bad = [line for line in found if "fault" in line]
    assert [(line["loss"], line["fault"], line["images"]) for line in bad] == [
        (None, "the loss is nan", [BAD])
    ]
    assert changed == ["fault" not in line for line in found]
    assert trainer.guard.skipped == 1
    assert trainer.finished_steps == 3


def test_a_run_stops_at_a_damaged_image_and_says_so(make_trainer, images, tmp_path):
    trainer = make_trainer(tmp_path, data=spoil(images, math.nan), on_bad_loss="stop", steps=3)
    with pytest.raises(TrainingError, match=rf"nan at step \d; a lower.*--on-bad.*image {BAD}$"):
        trainer.run(progress=False)
    last = lines(tmp_path)[-1]
    assert last["step"] == trainer.finished_steps + 1
    assert (last["fault"], last["images"]) == ("the loss is nan", [BAD])


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_left_out(clip, make_trainer):
    trainer = make_trainer(grad_clip=clip)
    trainer.step()
    before = state_of(trainer)
    # The square root of 0 is 0; its derivative is not finite.
    root_of_0 = lambda: (trainer.model.conv_in.weight.sum() * 0).sqrt()  # noqa: E731
    trainer.losses = lambda batch: root_of_0().expand(len(batch.x0))
    with pytest.warns(
        UserWarning, match=r"norm of the gradient is nan at step 2, .* in images \d+, \d"
    ):
        assert trainer.step() == 0
    assert same(before, state_of(trainer))
    assert len(trainer.refusal["images"]) == 4
    del trainer.losses
    trainer.step()
    assert trainer.refusal is None
    assert not same(before, state_of(trainer))


def test_a_resumed_run_leaves_out_what_the_uninterrupted_one_does(
    make_trainer, images, tmp_path, monkeypatch
):
    """By the median of losses from before its checkpoint, and the count of updates goes on."""
    monkeypatch.setattr(loss_guard, "ENOUGH", 3)
    options = {"spike": 1.02, "steps": 12, "max_skips": 9}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        whole = make_trainer(tmp_path / "whole", **options)
        whole.run(progress=False)
        stopped = make_trainer(tmp_path / "parts", **options)
        for _ in range(7):
            stopped.step()
        stopped.save()
        resumed = Trainer.resume(tmp_path / "parts", images)
        resumed.run(progress=False)
    assert all("times its median at step" in str(warning.message) for warning in told)
    assert 0 < stopped.guard.skipped < whole.guard.skipped < 9
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")[7:]
    assert same(state_of(resumed), state_of(whole))
    updates = {float(state["step"]) for state in resumed.optimizer.state.values()}
    assert updates == {12 - whole.guard.skipped}


def guard(**changes):
    return LossGuard(dataclasses.replace(OPTIONS, **changes))


def test_a_spike_is_measured_by_the_median_of_the_last_hundred():
    of = guard(spike=3.0)
    for number in range(loss_guard.ENOUGH):
        assert of.judge_loss(1e6) is None, number  # there is nothing to compare it with
        of.accept(100.0)
    assert of.judge_loss(300.0) is None
    fault = of.judge_loss(300.1)
    assert fault.reason == "the loss is 300.1, 3 times its median"
    assert [fault.blames(loss) for loss in (299.0, 300.5, math.nan)] == [False, True, True]
    for _ in range(loss_guard.WINDOW):
        of.accept(1.0)
    assert of.judge_loss(3.1) is not None
    assert of.judge_loss(3.0) is None
    assert guard(spike=0.0).judge_loss(1e30) is None


def test_losses_below_zero_have_no_spikes():
    of = guard(spike=3.0)
    for _ in range(loss_guard.ENOUGH):
        of.accept(-1.0)
    assert of.judge_loss(5.0) is None


def test_a_run_that_does_not_recover_ends():
    of, fault = guard(max_skips=3), guard().judge_loss(math.nan)
    images = [str(number) for number in range(12)]
    for _ in range(2):
        with pytest.warns(UserWarning, match="in images 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"):
            of.refuse(5, fault, images)
    of.accept(1.0)
    for step in (7, 8):
        with pytest.warns(UserWarning, match=f"at step {step}, which is left out: in image 3"):
            of.refuse(step, fault, ["3"])
    with pytest.raises(TrainingError, match="nan at step 9, and 3 steps in a row were left out"):
        of.refuse(9, fault, ["3"])


def test_the_state_goes_through_json():
    of = guard(spike=2.0)
    for loss in (0.1, 1 / 3, 2e-40):
        of.accept(loss)
    again = guard(spike=2.0)
    again.load_state_dict(json.loads(json.dumps(of.state_dict())))
    assert again.state_dict() == of.state_dict()
    again.load_state_dict({})  # of a version that kept none
    assert again.state_dict() == {"skipped": 0, "in_a_row": 0, "recent": []}


@pytest.mark.parametrize(
    "wrong", [{"recent": 3}, {"recent": ["a"]}, {"skipped": -1, "in_a_row": 0}]
)
def test_a_damaged_state_is_an_error(wrong, make_trainer, images, tmp_path):
    trainer = make_trainer(tmp_path, steps=1)
    trainer.run(progress=False)
    path = checkpoint.newest(tmp_path) / checkpoint.TRAINING
    facts = json.loads(path.read_text())
    facts["losses"] = {**facts["losses"], **wrong}
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"training\.json: unusable record of earlier losses"):
        Trainer.resume(tmp_path, images)


def test_options_out_of_range():
    for wrong in (1.0, -2.0, math.inf, math.nan):
        with pytest.raises(InputError, match="spike must be above 1, or 0 for no limit"):
            TrainingOptions(spike=wrong)
    with pytest.raises(InputError, match="unknown on_bad_loss 'warn', wanted one of stop, skip"):
        TrainingOptions(on_bad_loss="warn")
    with pytest.raises(InputError, match="max_skips must be at least 1"):
        TrainingOptions(max_skips=0)
