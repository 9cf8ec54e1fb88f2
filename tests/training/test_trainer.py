"""Training: the loss, the averages, and runs that go on as if they had never stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import resource
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from fastdiff import NoiseSchedule, losses, process, schedules
from fastdiff.checkpoints import checkpoint
from fastdiff.common.errors import (
    CheckpointError,
    DataError,
    InputError,
    TrainingError,
    UnwritableError,
)
from fastdiff.data.datasets import ImageSet, stream_seed
from fastdiff.data.image_grid import from_uint8
from fastdiff.training.batches import Batch
from fastdiff.training.trainer import Trainer, TrainingOptions, make_unet

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE, ONES = schedules.cosine(50), torch.ones(3, dtype=torch.float64)
OPTIONS = TrainingOptions(
    steps=6, batch_size=5, lr=1e-2, warmup=2, save_every=100, sample_every=0, seed=1
)


@pytest.fixture
def images(generator):
    """Seven 8x8 images of two classes, mirrored at random: more than one epoch in six steps."""
    pixels = torch.randint(256, (7, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 1])
    return ImageSet(pixels, labels, ("left", "right"), "arrows", flip=True)


@pytest.fixture
def make_trainer(tiny_unet, images):
    """A function that makes a trainer, always with the same initial weights."""

    def make(out=None, data=images, prediction="v", schedule=SCHEDULE, model=None, **changes):
        classes = len(data.classes) + (changes.get("label_dropout", 0) > 0)
        model = tiny_unet(num_classes=classes, dropout=0.3) if model is None else model
        of_trainer = {k: changes.pop(k) for k in ("objective", "levels") if k in changes}
        options = dataclasses.replace(OPTIONS, **changes)
        return Trainer(model, schedule, data, options, prediction=prediction, out=out, **of_trainer)

    return make


def losses_of(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]


def same_weights(a, b) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# Resuming.


@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    bf16, channels_last, make_trainer, images, tmp_path
):
    """With dropout, mirroring, hidden labels, a falling rate, averages: all random and kept."""
    changes = {"bf16": bf16, "channels_last": channels_last, "label_dropout": 0.4}
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.run(progress=False)

    stopped = make_trainer(tmp_path / "parts", save_every=2, **changes)
    for _ in range(4):
        stopped.step()
    stopped.save()
    stopped.step()  # and then the machine stops: this step is lost
    torch.manual_seed(12345)
    resumed = Trainer.resume(tmp_path / "parts", images)
    assert resumed.finished_steps == 4
    resumed.run(progress=False)

    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")[4:]
    assert same_weights(resumed.model, whole.model)
    assert same_weights(resumed.ema, whole.ema)
    files = [
        (checkpoint.newest(tmp_path / run) / checkpoint.WEIGHTS).read_bytes()
        for run in ("whole", "parts")
    ]
    assert files[0] == files[1]


@pytest.mark.gpu
def test_a_run_is_resumed_on_a_gpu(make_trainer, tiny_unet, images, tmp_path):
    """AdamW's fused kernel wants its step count on the device as well."""
    trainer = make_trainer(tmp_path, model=tiny_unet(num_classes=2).cuda())
    for _ in range(3):
        trainer.step()
    trainer.save()
    resumed = Trainer.resume(tmp_path, images, device="cuda")
    assert resumed.step() == pytest.approx(trainer.step(), rel=1e-3)
    assert resumed.step() == pytest.approx(trainer.step(), rel=1e-3)


def test_a_resumed_run_on_fused_operations_is_the_uninterrupted_one(make_trainer, images, tmp_path):
    """Bit for bit, with sizes that take Winograd's method and with two threads."""
    data = dataclasses.replace(images, images=images.images.repeat(1, 1, 4, 4))
    model = make_unet(32, 1, 2, widths=(32, 32), attention=(1,))
    whole = make_trainer(tmp_path / "whole", data=data, model=model)
    torch.set_num_threads(2)
    for _ in range(2):
        whole.step()
    whole.save()
    resumed = Trainer.resume(tmp_path / "whole", data)
    assert resumed.step() == whole.step()
    assert same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_fused_operations_learn_the_same(bf16, make_trainer):
    """To rounding, dropout's random numbers included. (AdamW makes steps of gradients that are zero
    but for rounding, so that weights differ.)
    """
    compiled, eager = (make_trainer(compile=on, bf16=bf16) for on in (True, False))
    models = [trainer.micro_batches.model for trainer in (compiled, eager)]
    assert type(models[0]) is not type(models[1])
    for _ in range(4):
        assert compiled.step() == pytest.approx(eager.step(), rel=2e-2 if bf16 else 1e-4)


def test_a_hook_on_a_layer_is_called(make_trainer):
    """Then the network itself is called, as a graph would pass by the hook."""
    trainer, seen = make_trainer(), []
    trainer.model.conv_in.register_forward_hook(lambda *_: seen.append(1))
    trainer.step()
    assert seen


def test_runs_of_versions_without_fused_training_go_on_without(make_trainer, images, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    file = checkpoint.newest(tmp_path) / checkpoint.TRAINING
    facts = json.loads(file.read_text())
    assert facts["options"].pop("compile") is True
    file.write_text(json.dumps(facts))
    assert not Trainer.resume(tmp_path, images).options.compile


def test_the_losses_depend_on_the_seed(make_trainer):
    runs = [[make_trainer(seed=seed).step() for _ in range(2)] for seed in (1, 2)]
    assert runs[0][0] == runs[0][1]
    assert runs[0] != runs[1]


def test_the_log_of_a_killed_run_is_cut_to_its_checkpoint(make_trainer, images, tmp_path):
    run = make_trainer(tmp_path, save_every=3, steps=5)
    run.run(progress=False)
    for step in (4, 5):
        folder = checkpoint.step_folder(tmp_path, step)
        if folder.exists():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    before = losses_of(tmp_path)
    with (tmp_path / "losses.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    assert Trainer.resume(tmp_path, images).run(progress=False) is None
    assert losses_of(tmp_path) == before
    steps = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5]
    assert steps[0]["lr"] == run.learning_rate(0)


def test_a_resumed_run_may_go_further(make_trainer, images, tmp_path):
    make_trainer(tmp_path, steps=3, lr_schedule="constant").run(progress=False)
    options = dataclasses.replace(OPTIONS, steps=5, lr_schedule="constant")
    resumed = Trainer.resume(tmp_path, images, options)
    resumed.run(progress=False)
    whole = make_trainer(steps=5, lr_schedule="constant")
    for _ in range(5):
        whole.step()
    assert same_weights(resumed.model, whole.model)


def test_a_run_that_is_done_has_nothing_to_do(make_trainer, images, tmp_path):
    make_trainer(tmp_path, steps=2).run(progress=False)
    folder = checkpoint.newest(tmp_path)
    written = (folder / checkpoint.META).stat().st_mtime_ns
    assert Trainer.resume(tmp_path, images).run(progress=False) is None
    assert (folder / checkpoint.META).stat().st_mtime_ns == written


def test_resuming_before_the_first_step(make_trainer, images, tmp_path):
    """A signal may come before a step is done; the checkpoint then holds no moments yet."""
    early = make_trainer(tmp_path)
    early.save()
    resumed = Trainer.resume(tmp_path, images)
    assert resumed.finished_steps == 0
    straight = make_trainer()
    assert [resumed.step() for _ in range(3)] == [straight.step() for _ in range(3)]


def test_facts_and_options_are_kept(make_trainer, images, tmp_path):
    trainer = make_trainer(tmp_path, steps=1)
    trainer.record = {"command": "fastdiff train"}
    trainer.run(progress=False)
    resumed = Trainer.resume(tmp_path, images)
    assert resumed.record == {"command": "fastdiff train"}
    assert resumed.options == trainer.options
    assert Trainer.resume(tmp_path, images, record={"new": 1}).record == {"new": 1}


def in_one_process(model):
    """DistributedDataParallel, of a group of one."""
    model.to(memory_format=torch.channels_last)
    return nn.parallel.DistributedDataParallel(model)


def partly_compiled(model):
    model.mid_block = torch.compile(model.mid_block, backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "in place": compiled_in_place,
    "partly": partly_compiled,
    "parallel": nn.DataParallel,
    "distributed": in_one_process,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_model_is_kept_under_its_own_names(
    wrap, make_trainer, tiny_unet, images, tmp_path
):
    """Its run is resumed, its checkpoint loaded, sampled from and exported as any other's."""
    plain = make_trainer()
    names = set(plain.model.state_dict())
    given = wrap(tiny_unet(num_classes=2, dropout=0.3))
    trainer = make_trainer(tmp_path / "run", model=given)
    for _ in range(3):
        assert trainer.step() == pytest.approx(plain.step(), rel=1e-5)
    trainer.save()
    assert trainer.model is given
    folder = checkpoint.newest(tmp_path / "run")
    assert set(load_file(folder / checkpoint.WEIGHTS)) == names
    kinds = ("model", "exp_avg", "exp_avg_sq", "step")
    assert set(load_file(folder / checkpoint.STATE)) == {f"{k}.{n}" for k in kinds for n in names}

    resumed = Trainer.resume(tmp_path / "run", images)
    assert resumed.step() == pytest.approx(trainer.step(), rel=1e-5)
    averages = trainer.checkpoint()
    checkpoint.export(averages, tmp_path / "shared")
    found = checkpoint.load(tmp_path / "shared").model.state_dict()
    ours = list(trainer.ema.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(found.values(), ours, strict=True))
    assert np.array_equal(*(np.asarray(t.preview(columns=1)) for t in (trainer, trainer)))


@pytest.mark.usefixtures("group")
def test_weights_under_distributed_keep_the_layout_of_their_gradients(make_trainer, tiny_unet):
    """Else the optimizer would add to each weight what belongs to another."""
    plain = make_trainer(model=tiny_unet(num_classes=2))  # whose dropout depends on no layout
    model = nn.parallel.DistributedDataParallel(tiny_unet(num_classes=2))
    trainer = make_trainer(model=model)
    for _ in range(3):
        assert trainer.step() == pytest.approx(plain.step(), rel=1e-5)


def test_a_checkpoint_may_hold_a_wrapped_model(tiny_checkpoint, tmp_path):
    whole = tiny_checkpoint.generate(
        tiny_checkpoint.diffusion().sampler("ddim", 2), labels=[0, 1], progress=False,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    for name in ("compiled", "parallel", "both"):
        held = dataclasses.replace(tiny_checkpoint, model=WRAPPED[name](tiny_checkpoint.model))
        checkpoint.save(held, tmp_path / name, dtype=torch.bfloat16)
        assert checkpoint.load(tmp_path / name).channels == held.channels == 1
        drawn = held.generate(
            held.diffusion().sampler("ddim", 2), labels=[0, 1], progress=False,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        torch.testing.assert_close(drawn.images, whole.images, rtol=1e-4, atol=1e-4)


def test_checkpoints_with_the_compilers_names_are_resumed(make_trainer, images, tmp_path):
    """As versions wrote them that did not look through torch.compile."""
    trainer = make_trainer(tmp_path)
    for _ in range(3):
        trainer.step()
    trainer.save()
    folder = checkpoint.newest(tmp_path)
    for file, insert in (
        (checkpoint.STATE, lambda name: name.replace(".", "._orig_mod.", 1)),
        (checkpoint.WEIGHTS, lambda name: name.replace("mid_block.", "mid_block._orig_mod.")),
    ):
        tensors = load_file(folder / file)
        save_file({insert(name): value for name, value in tensors.items()}, folder / file)
    forget_checksums(folder)
    resumed = Trainer.resume(tmp_path, images)
    assert resumed.step() == trainer.step()
    assert same_weights(resumed.ema, trainer.ema)


def test_images_are_known_by_their_content(make_trainer, images, tmp_path):
    """Under another name, and with values that another processor has rounded otherwise."""
    real = dataclasses.replace(images, images=from_uint8(images.images))
    make_trainer(tmp_path, data=real, steps=1).run(progress=False)
    noise = torch.rand(real.images.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    moved = dataclasses.replace(real, images=real.images + 1e-6 * noise, name="elsewhere")
    assert Trainer.resume(tmp_path, moved).finished_steps == 1
    levels = dataclasses.replace(images, name="as 8 bits")
    assert Trainer.resume(tmp_path, levels).finished_steps == 1


def test_images_that_are_almost_the_same_are_told_of(make_trainer, images, tmp_path):
    """As of another decoder; one pixel of 448 differs by 10 of 255 levels."""
    make_trainer(tmp_path, steps=1).run(progress=False)
    pixels = images.images.clone()
    pixels[3, 0, 2, 2] += 10
    with pytest.warns(UserWarning, match=r"not exactly those of 'arrows'.* by 0\.47 of 255"):
        resumed = Trainer.resume(tmp_path, dataclasses.replace(images, images=pixels))
    resumed.options = dataclasses.replace(resumed.options, steps=2)
    resumed.run(progress=False)
    assert Trainer.resume(tmp_path, dataclasses.replace(images, images=pixels)).finished_steps == 2


def test_a_checkpoint_without_a_fingerprint_is_resumed_with_a_warning(
    make_trainer, images, tmp_path
):
    make_trainer(tmp_path, steps=1).run(progress=False)
    path = checkpoint.newest(tmp_path) / checkpoint.TRAINING
    facts = json.loads(path.read_text())
    del facts["fingerprint"]
    path.write_text(json.dumps(facts))
    with pytest.warns(UserWarning, match=r"training\.json has no fingerprint of the images"):
        assert Trainer.resume(tmp_path, images).finished_steps == 1


def test_a_run_stays_in_its_folder(make_trainer, images, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    made = make_trainer("run", steps=1)
    monkeypatch.chdir("elsewhere")
    made.run(progress=False)
    assert checkpoint.newest(tmp_path / "run").name == "step-00000001"
    monkeypatch.chdir(tmp_path)
    resumed = Trainer.resume("run", images, dataclasses.replace(OPTIONS, steps=2))
    monkeypatch.chdir("elsewhere")
    resumed.run(progress=False)
    assert checkpoint.newest(tmp_path / "run").name == "step-00000002"


def forget_checksums(folder):
    """As of versions that recorded none."""
    path = folder / checkpoint.TRAINING
    facts = json.loads(path.read_text())
    del facts[checkpoint.CHECKSUMS]
    path.write_text(json.dumps(facts))


def test_what_cannot_be_resumed(make_trainer, images, tmp_path, tiny_checkpoint):
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        Trainer.resume(tmp_path, images)
    make_trainer(tmp_path / "run", steps=1).run(progress=False)
    fewer = ImageSet(images.images[:6], images.labels[:6], images.classes)
    with pytest.raises(DataError, match=r"trained on 7 images .* now there are 6"):
        Trainer.resume(tmp_path / "run", fewer)
    inverted = dataclasses.replace(images, images=255 - images.images, name="negatives")
    with pytest.raises(
        DataError, match=r"'arrows' then and of 'negatives' now differ by \d+\.\d of"
    ):
        Trainer.resume(tmp_path / "run", inverted)
    shuffled = dataclasses.replace(images, images=images.images[[1, 0, 2, 3, 4, 5, 6]])
    with pytest.raises(DataError, match="the run trained on other images"):
        Trainer.resume(tmp_path / "run", shuffled)
    relabelled = dataclasses.replace(images, labels=1 - images.labels)
    with pytest.raises(DataError, match="with other labels: those of 'arrows' then"):
        Trainer.resume(tmp_path / "run", relabelled)
    renamed = ImageSet(images.images, images.labels, ("right", "left"))
    with pytest.raises(DataError, match=r"\('left', 'right'\), now .* \('right', 'left'\)"):
        Trainer.resume(tmp_path / "run", renamed)
    facts = checkpoint.newest(tmp_path / "run") / checkpoint.TRAINING
    written = facts.read_text()
    for wrong in ([1.0], ["a"] * 16, 3):
        altered = json.loads(written)
        altered["fingerprint"]["sums"] = wrong
        facts.write_text(json.dumps(altered))
        with pytest.raises(CheckpointError, match=r"sums' must be a list|unusable finger"):
            Trainer.resume(tmp_path / "run", images)
    facts.write_text(written)
    state = checkpoint.newest(tmp_path / "run") / checkpoint.STATE
    tensors = load_file(state)
    del tensors["exp_avg.conv_in.weight"]
    save_file(tensors, state)
    forget_checksums(state.parent)
    with pytest.raises(CheckpointError, match=r"exp_avg\.conv_in\.weight must have .* nothing"):
        Trainer.resume(tmp_path / "run", images)
    shared = checkpoint.step_folder(tmp_path / "shared", 1)
    checkpoint.export(tiny_checkpoint, shared)
    with pytest.raises(CheckpointError, match="cannot be resumed: it has no training"):
        Trainer.resume(tmp_path / "shared", images)


# One step.


@pytest.mark.parametrize("fails", [False, True], ids=["good", "failing"])
def test_a_step_leaves_the_callers_random_numbers_alone(fails, make_trainer):
    trainer = make_trainer()
    if fails:
        weight = trainer.model.conv_in.weight
        trainer.losses = lambda batch: weight.sum() * torch.rand(len(batch.x0)) * torch.nan
    drawn, wanted = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        wanted.append(torch.rand(3))
        torch.manual_seed(seed)
        with pytest.raises(TrainingError) if fails else contextlib.nullcontext():
            trainer.step()
        drawn.append(torch.rand(3))
    assert torch.equal(torch.stack(drawn), torch.stack(wanted))


def test_the_dropout_of_a_step_is_drawn_from_the_seed_and_the_step_alone(make_trainer):
    """The same as from torch's generators, seeded by themselves: runs of earlier versions go on."""
    trainer = make_trainer()
    dropped = []
    trainer.model.down_blocks[0].register_forward_hook(
        lambda *args: dropped.append(torch.rand(3, device=trainer.parameters[0].device))
    )
    for step in range(2):
        torch.manual_seed(99)
        trainer.step()
        torch.manual_seed(stream_seed(1, "dropout", step))
        trainer.model.train()(torch.zeros(5, 1, 8, 8), 0, torch.zeros(5, dtype=torch.int64))
    assert torch.equal(dropped[0], dropped[1])
    assert torch.equal(dropped[2], dropped[3])
    assert not torch.equal(dropped[0], dropped[2])


@pytest.mark.gpu
def test_a_step_on_a_gpu_leaves_its_random_numbers_alone(make_trainer, tiny_unet):
    trainer = make_trainer(model=tiny_unet(num_classes=2, dropout=0.3).cuda())
    torch.cuda.manual_seed(1)
    wanted = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(1)
    trainer.step()
    assert torch.equal(torch.rand(3, device="cuda"), wanted)


def test_the_loss_is_the_mean_squared_error_of_the_prediction(make_trainer, images, generator):
    for prediction in process.KINDS:
        trainer = make_trainer(prediction=prediction)
        trainer.model.eval()
        x0, labels = images.batch(torch.tensor([0, 3, 5]), generator)
        t, noise = torch.tensor([0, 20, 49]), torch.randn(3, 1, 8, 8, generator=generator)
        abar = SCHEDULE.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        target = {
            "eps": noise,
            "x0": x0,
            "v": abar.sqrt() * noise - (1 - abar).sqrt() * x0,
            "score": -noise / (1 - abar).sqrt(),
            "flow": noise - x0,
        }[prediction]
        with torch.no_grad():
            wanted = ((trainer.model(x_t, t, labels) - target) ** 2).mean()
            got = trainer.loss(Batch(x0, labels, t, ONES, noise))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_the_average_follows_its_formula(make_trainer):
    """decay = min(ema, (1 + s) / (10 + s)), in float64 here."""
    trainer = make_trainer(ema=0.25)
    average = trainer.model.conv_in.weight.detach().double().clone()
    for step in range(5):
        trainer.step()
        decay = min(0.25, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * trainer.model.conv_in.weight.detach().double()
        torch.testing.assert_close(
            trainer.ema.conv_in.weight.double(), average, rtol=1e-6, atol=1e-7
        )
    assert not trainer.ema.training
    assert not any(p.requires_grad for p in trainer.ema.parameters())
    assert trainer.checkpoint().model is trainer.ema


def test_the_learning_rate_rises_and_falls(make_trainer):
    cosine = make_trainer(steps=12, warmup=4, lr=1.0)
    assert [cosine.learning_rate(s) for s in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert cosine.learning_rate(8) == pytest.approx(0.5)
    assert cosine.learning_rate(12) == pytest.approx(0, abs=1e-15)
    assert cosine.learning_rate(99) == pytest.approx(0, abs=1e-15)
    constant = make_trainer(steps=12, warmup=0, lr=1.0, lr_schedule="constant")
    assert [constant.learning_rate(s) for s in (0, 11)] == [1.0, 1.0]
    cosine.step()
    assert cosine.optimizer.param_groups[0]["lr"] == 0.25


def test_the_gradient_is_limited(make_trainer):
    """After one step the first moment is a tenth of the gradient that the limit lets through."""
    free, bound = make_trainer(grad_clip=0.0), make_trainer(grad_clip=1e-3)
    norms = []
    for trainer in (free, bound):
        trainer.step()
        moments = (state["exp_avg"] for state in trainer.optimizer.state.values())
        norms.append(10 * math.sqrt(sum(float((m**2).sum()) for m in moments)))
    assert norms[0] > 0.01
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_training_learns(make_trainer):
    """One image, no dropout to speak of: the loss must fall far below that of the first step."""
    image = ImageSet(torch.full((1, 1, 8, 8), 0.7), name="one")
    trainer = make_trainer(
        data=image, steps=80, batch_size=16, lr=1e-2, lr_schedule="constant", prediction="x0"
    )
    found = [trainer.step() for _ in range(80)]
    assert np.mean(found[-5:]) < 0.1 * np.mean(found[:5])


def test_parts_of_a_batch_are_the_batch(make_trainer, images):
    """What an image trains on is the same in whichever part of the batch it falls."""
    trainer = make_trainer(
        data=dataclasses.replace(images, flip=True),
        label_dropout=0.3,
        batch_size=7,
        timestep_sampler="uniform",
    )
    draws = trainer.draw(5)
    whole = trainer.batch(draws)
    parts = [trainer.batch(draws.part(*ends)) for ends in ((0, 3), (3, 4), (4, 7))]
    for name in ("x0", "labels", "t", "weights", "noise"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name)), name
    assert draws.mirrored.any()
    assert draws.hidden.any()


def test_label_dropout_hides_its_share_of_the_labels(make_trainer, images):
    trainer = make_trainer(label_dropout=0.3, batch_size=200)
    seen = torch.cat([trainer.batch(trainer.draw(step)).labels for step in range(20)])
    assert set(seen.tolist()) == {0, 1, 2}
    assert (seen == 2).double().mean().item() == pytest.approx(0.3, abs=0.03)
    # What is not hidden, and everything else that is random, is as without it.
    plain, hidden = (each.batch(each.draw(3)) for each in (make_trainer(batch_size=200), trainer))
    for name in ("x0", "t", "weights", "noise"):
        assert torch.equal(getattr(plain, name), getattr(hidden, name))
    kept = hidden.labels != 2
    assert torch.equal(plain.labels[kept], hidden.labels[kept])
    assert trainer.checkpoint().null_class
    assert not make_trainer().checkpoint().null_class


def test_label_dropout_that_does_not_fit_is_refused(make_trainer, images, tiny_unet):
    with pytest.raises(InputError, match="2 classes, the data 2 and label_dropout needs one more"):
        make_trainer(label_dropout=0.1, model=tiny_unet(num_classes=2))
    with pytest.raises(InputError, match="hides labels, but the data has none"):
        make_trainer(data=images.without_labels(), label_dropout=0.1, model=tiny_unet())
    with pytest.raises(InputError, match=r"label_dropout must lie in \[0, 1\), got 1"):
        TrainingOptions(label_dropout=1.0)
    with pytest.raises(InputError, match="unknown weighting 'x', wanted one of none, snr, min_snr"):
        TrainingOptions(weighting="x")


@pytest.mark.parametrize("name", ["snr", "min_snr", "p2", "edm", "vlb"])
def test_a_weighting_multiplies_each_images_error(name, make_trainer, generator):
    plain, weighted = make_trainer(), make_trainer(weighting=name)
    t = torch.tensor([3, 20, 44])
    x0, noise = (torch.randn(3, 1, 8, 8, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 1])
    plain.model.eval(), weighted.model.eval()  # without dropout
    table = losses.weighting(SCHEDULE, "v", name)
    each = [
        float(table[t[i]])
        * plain.loss(Batch(*(x[i : i + 1] for x in (x0, labels, t, ONES, noise))))
        for i in range(3)
    ]
    torch.testing.assert_close(
        weighted.loss(Batch(x0, labels, t, ONES, noise)),
        torch.stack(each).mean(),
        rtol=1e-4,
        atol=0,
    )


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, save_every=1)
    trainer.step()
    trainer.save()
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.losses = lambda batch: (
        trainer.model.conv_in.weight.sum().expand(len(batch.x0)) * torch.nan
    )
    with pytest.raises(TrainingError, match="loss is nan at step 2; a lower learning rate"):
        trainer.run(progress=False)
    assert all(torch.equal(kept[k], v) for k, v in trainer.model.state_dict().items())
    assert checkpoint.load(tmp_path).step == 1


def test_a_gradient_that_is_not_finite_stops_the_run(make_trainer):
    trainer = make_trainer()
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    # The square root of 0 is 0; its derivative is not finite.
    trainer.losses = lambda batch: (
        (trainer.model.conv_in.weight.sum() * 0).sqrt().expand(len(batch.x0))
    )
    with pytest.raises(TrainingError, match="norm of the gradient is nan at step 1"):
        trainer.step()
    assert all(torch.equal(kept[k], v) for k, v in trainer.model.state_dict().items())


# A run and what it leaves on the disk.


def test_checkpoints_grids_and_losses_along_the_way(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=6, save_every=2, sample_every=3, keep=2)
    assert trainer.run(progress=False) is None
    assert [p.name for p in checkpoint.all_steps(tmp_path)] == ["step-00000004", "step-00000006"]
    assert len(losses_of(tmp_path)) == 6
    grids = sorted((tmp_path / "samples").iterdir())
    assert [grid.name for grid in grids] == ["step-00000003.png", "step-00000006.png"]
    picture = np.asarray(Image.open(grids[1]))
    assert picture.shape[0] == 4 + 2 * 68  # a row a class
    found = checkpoint.load(tmp_path)
    assert (found.step, found.seed, found.dataset) == (6, 1, "arrows")
    assert found.classes == ("left", "right")
    assert same_weights(found.model, trainer.ema)
    assert not same_weights(found.model, trainer.model)


def test_a_run_without_a_folder_writes_nothing(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(steps=2, save_every=1, sample_every=1)
    trainer.run(progress=False)
    assert trainer.finished_steps == 2
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_to_standard_error(make_trainer, capsys):
    make_trainer(steps=2).run()
    out, err = capsys.readouterr()
    assert out == ""
    assert "training" in err
    assert "loss=" in err


@pytest.mark.filterwarnings("ignore:fastdiff. .* never reaches noise")
def test_the_preview_is_always_of_the_same_noise(make_trainer, images):
    trainer = make_trainer(data=images.without_labels())
    first, again = (np.asarray(trainer.preview(columns=2)) for _ in range(2))
    assert np.array_equal(first, again)
    trainer.step()
    assert not np.array_equal(np.asarray(trainer.preview(columns=2)), first)
    short = make_trainer(schedule=NoiseSchedule(torch.tensor([0.5, 0.9])))
    assert short.preview(columns=1).height > 0


def test_a_used_folder_is_not_written_into(make_trainer, tmp_path):
    """Else the new run's checkpoints would be pruned as older than the old run's."""
    make_trainer(tmp_path, steps=2).run(progress=False)
    with pytest.raises(InputError, match="holds checkpoints of an earlier run"):
        make_trainer(tmp_path)


def test_a_full_disk_ends_the_run_at_its_last_step_and_the_old_checkpoint_survives(
    make_trainer, images, tmp_path, monkeypatch
):
    trainer = make_trainer(tmp_path, save_every=2)
    trainer.step()
    trainer.step()
    trainer.save()
    monkeypatch.setattr("fastdiff.checkpoints.checkpoint.save_file", full_disk)
    with (
        pytest.warns(UserWarning, match="step-00000004: No space left on device; earlier check"),
        pytest.raises(UnwritableError, match="step-00000006: No space left on device"),
    ):
        trainer.run(progress=False)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert Trainer.resume(tmp_path, images).finished_steps == 2
    trainer.save()  # the trainer itself has lost nothing
    assert checkpoint.load(tmp_path).step == 6


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(
    make_trainer, images, tmp_path, monkeypatch
):
    trainer, real = make_trainer(tmp_path, save_every=2, keep=1), checkpoint.save_file

    def full_at_step_4(tensors, path):
        return full_disk() if trainer.finished_steps == 4 else real(tensors, path)

    monkeypatch.setattr("fastdiff.checkpoints.checkpoint.save_file", full_at_step_4)
    take_step, kept = trainer.step, []

    def step():
        kept.append([path.name for path in checkpoint.all_steps(tmp_path)])
        return take_step()

    trainer.step = step
    with pytest.warns(UserWarning, match="step-00000004: No space left") as told:
        assert trainer.run(progress=False) is None
    assert len(told) == 1
    assert kept == [[], [], *[["step-00000002"]] * 4]
    assert [path.name for path in checkpoint.all_steps(tmp_path)] == ["step-00000006"]


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["open", "write_text"])
def test_a_log_that_cannot_be_written(call, make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(Path, call, full_disk)
    with pytest.raises(InputError, match=r"losses\.jsonl: No space left on device"):
        trainer.run(progress=False)


def test_a_sample_grid_that_cannot_be_written_is_a_warning(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=3, save_every=1, sample_every=1, keep=9)
    (tmp_path / "samples").write_text("in the way")
    with pytest.warns(
        UserWarning, match="no sample grid: cannot write .*step-00000001.png"
    ) as told:
        assert trainer.run(progress=False) is None
    assert len(told) == 1  # of three that failed
    assert [p.name[-1] for p in checkpoint.all_steps(tmp_path)] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("images must be finite"),
        MemoryError("Unable to allocate"),
        OSError(errno.ENOSPC, "No space"),
    ],
    ids=["not finite", "memory", "disk"],
)
def test_a_sample_grid_that_cannot_be_made_is_a_warning(error, make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=2, sample_every=2)

    def preview():
        assert checkpoint.newest(tmp_path).name == "step-00000002"  # which comes first
        raise error

    trainer.preview = preview
    with pytest.warns(UserWarning, match=f"no sample grid: .*{re.escape(str(error))}"):
        trainer.run(progress=False)


def test_a_bug_in_the_sample_grid_is_none(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=2, sample_every=2)
    trainer.preview = lambda: {}["a bug"]
    with pytest.raises(KeyError, match="a bug"):
        trainer.run(progress=False)
    assert checkpoint.load(tmp_path).step == 2


def test_a_log_that_is_no_file_is_a_warning(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=4, save_every=2)
    (tmp_path / "losses.jsonl").mkdir()
    with pytest.warns(UserWarning, match=r"no line in the log: cannot write .*losses\.js") as told:
        assert trainer.run(progress=False) is None
    assert len(told) == 1
    assert [p.name[-1] for p in checkpoint.all_steps(tmp_path)] == ["2", "4"]


def test_a_line_that_only_half_fits_on_the_disk_is_written_later(make_trainer, tmp_path):
    """The limit on a file's size is met in the middle of step 2's line, and then lifted."""
    trainer = make_trainer(tmp_path, steps=4, save_every=3)
    take_step, log = trainer.step, tmp_path / "losses.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step():
        loss = take_step()
        full = trainer.finished_steps == 2
        limit = log.stat().st_size + 5 if full else before[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        return loss

    trainer.step = step
    try:
        with pytest.warns(UserWarning, match=r"no line in the log: cannot write .*losses\.jsonl"):
            assert trainer.run(progress=False) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert [p.name[-1] for p in checkpoint.all_steps(tmp_path)] == ["3", "4"]


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_with_a_checkpoint(which, make_trainer, images, tmp_path):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    trainer = make_trainer(tmp_path)
    take_step = trainer.step

    def step():
        if trainer.finished_steps == 2:
            os.kill(os.getpid(), which)
        return take_step()

    trainer.step = step
    assert trainer.run(progress=False) == which
    assert trainer.finished_steps == 3  # the running step was finished
    assert Trainer.resume(tmp_path, images).finished_steps == 3
    assert len(losses_of(tmp_path)) == 3
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_signal_ends_it_at_once(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    taken = []

    def step():
        os.kill(os.getpid(), signal.SIGINT)
        taken.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        taken.append("never")

    trainer.step = step
    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False)
    assert taken == ["first"]
    assert checkpoint.newest(tmp_path) is None


def test_training_works_in_another_thread(make_trainer, tmp_path):
    """Where no signal handler can be set."""
    trainer = make_trainer(tmp_path, steps=2)
    thread = threading.Thread(target=trainer.run, kwargs={"progress": False})
    thread.start()
    thread.join()
    assert checkpoint.load(tmp_path).step == 2


def test_model_data_and_schedule_must_fit(make_trainer, tiny_unet, images, tmp_path):
    zero_snr = schedules.rescale_zero_terminal_snr(SCHEDULE)
    with pytest.raises(InputError, match="eps says nothing of x0 at zero signal-to-noise ratio"):
        make_trainer(prediction="eps", schedule=zero_snr)
    make_trainer(prediction="v", schedule=zero_snr).step()
    with pytest.raises(ValueError, match="unknown prediction kind 'w'"):
        make_trainer(prediction="w")
    with pytest.raises(InputError, match="model has 0 classes, the data 2"):
        make_trainer(model=tiny_unet())
    with pytest.raises(InputError, match=r"takes samples of \(3, 8, 8\), the data has \(1, 8"):
        make_trainer(model=tiny_unet(channels=3, num_classes=2))
    with pytest.raises(InputError, match=r"takes samples of \(1, 16, 16\)"):
        make_trainer(model=tiny_unet(image_size=16, num_classes=2))
    latents = ImageSet(torch.zeros(3, 4, 8, 8))
    four = tiny_unet(channels=4)
    with pytest.raises(InputError, match=r"shape \(4, 8, 8\); set sample_every to 0"):
        make_trainer(tmp_path, data=latents, model=four, sample_every=1)
    make_trainer(tmp_path, data=latents, model=four, sample_every=0).step()
