"""Classifiers of noised images: training on each process, files, what fits what, guiding."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff import data, schedules, sde
from fastdiff.checkpoints import classifier_checkpoint
from fastdiff.checkpoints.classifier_checkpoint import META, WEIGHTS, Architecture
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import CheckpointError, InputError, TrainingError
from fastdiff.nn.image_unet import make_unet
from fastdiff.training.classifier_trainer import ClassifierOptions, ClassifierTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Architecture(8, 1, widths=(16, 32), layers_per_block=1, attention=())
OPTIONS = ClassifierOptions(steps=150, lr=3e-3, ema=0.95)
EDM = sde.EDM(0.01, 10.0)
FORWARDS = {
    "cosine": (schedules.cosine(), "v"),
    "edm": (EDM, "edm"),
}


def checkpoint(name="cosine", classes=(), image_size=8, channels=1):
    """An untrained checkpoint."""
    torch.manual_seed(0)
    model = make_unet(
        image_size, channels, len(classes), widths=(8, 16), layers_per_block=1, attention=()
    )
    forward, prediction = FORWARDS[name]
    return Checkpoint(model.eval(), forward, prediction, classes=classes)


@cache
def trained(name):
    """A trainer at its last step, and its losses."""
    trainer = ClassifierTrainer(checkpoint(name), data.digits("train", 8), SMALL, OPTIONS)
    return trainer, [trainer.step() for _ in range(OPTIONS.steps)]


@pytest.fixture
def digits():
    return data.digits("train", 8)


@pytest.mark.parametrize("name", FORWARDS)
def test_learns_at_every_level(name, digits):
    trainer, losses = trained(name)
    assert sum(losses[:5]) / 5 == pytest.approx(math.log(10), abs=0.2)
    # A third or more of the times leave nothing to see, and cost log 10 for ever.
    assert sum(losses[-30:]) / 30 < math.log(10) - 0.3
    held_out = data.digits("test", 8)
    found = trainer.classifier(held_out)
    assert (found.step, found.dataset, found.classes) == (150, "digits", digits.classes)
    assert [level.sigma / level.alpha for level in found.accuracy if level.alpha] == sorted(
        (level.sigma / level.alpha for level in found.accuracy if level.alpha), reverse=True
    )
    assert found.accuracy[0].share < 0.3
    assert found.accuracy[-1].share > 0.6
    # Asked of images without noise, at the least noise's own label, it does as well.
    forward = FORWARDS[name][0]
    low = 0 if name != "edm" else forward.label(torch.tensor(forward.smallest)).item()
    x, labels = held_out.batch(torch.arange(len(held_out)))
    share = (found(x, torch.tensor(low)).argmax(1) == labels).float().mean().item()
    assert share == pytest.approx(found.accuracy[-1].share, abs=0.05)


def test_the_time_it_is_given(digits, monkeypatch):
    for name, wanted in (
        ("cosine", torch.arange(1000)),
        ("edm", EDM.label(sde.discretize(EDM).times).float()),
    ):
        trainer, seen = ClassifierTrainer(checkpoint(name), digits, SMALL, OPTIONS), []
        monkeypatch.setattr(
            trainer.model, "forward", lambda x, t, seen=seen: seen.append(t) or x.new_zeros(64, 10)
        )
        with pytest.raises(RuntimeError, match="does not require grad"):
            trainer.step()
        assert seen[0].dtype == wanted.dtype
        assert seen[0].shape == (64,)
        assert bool(torch.isin(seen[0], wanted).all())


def test_a_seed_decides(digits):
    def trained(seed):
        trainer = ClassifierTrainer(checkpoint(), digits, SMALL, replace(OPTIONS, seed=seed))
        for _ in range(2):
            trainer.step()
        return trainer.classifier().model.head.weight

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_the_callers_random_numbers_are_left_alone(digits):
    found = checkpoint()
    before = torch.get_rng_state()
    trainer = ClassifierTrainer(found, digits, SMALL, OPTIONS)
    trainer.step()
    trainer.classifier(digits)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite(digits):
    trainer = ClassifierTrainer(checkpoint(), digits, SMALL, OPTIONS)
    with torch.no_grad():
        trainer.model.head.bias.fill_(math.nan)
    before = trainer.model.conv_in.weight.clone()
    with pytest.raises(TrainingError, match="the loss is nan at step 1"):
        trainer.step()
    assert torch.equal(trainer.model.conv_in.weight, before)


@pytest.fixture
def saved(digits, tmp_path):
    """A classifier of two steps, and the folder it is in."""
    trainer = ClassifierTrainer(checkpoint("edm"), digits, SMALL, replace(OPTIONS, steps=2, seed=4))
    assert trainer.run(progress=False) is None
    found = trainer.classifier(data.digits("test", 8))
    classifier_checkpoint.save(found, tmp_path / "saved")
    return found, tmp_path / "saved"


def test_files(saved, generator):
    made, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == [META, WEIGHTS]
    found = classifier_checkpoint.load(folder)
    assert not found.model.training
    x, t = torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([-1.0, 0.0, 1.0])
    assert torch.equal(found(x, t), made(x, t))
    for name in ("architecture", "classes", "step", "seed", "dataset", "accuracy"):
        assert getattr(found, name) == getattr(made, name), name
    assert repr(found.forward) == repr(made.forward)
    assert len(found.accuracy) == 5
    with pytest.raises(CheckpointError, match="exists already"):
        classifier_checkpoint.save(made, folder)


@pytest.mark.parametrize(
    "wrap", [torch.nn.DataParallel, torch.compile], ids=["parallel", "compiled"]
)
def test_a_wrapped_model_is_written_under_its_own_names(saved, tmp_path, wrap):
    found, folder = saved
    classifier_checkpoint.save(replace(found, model=wrap(found.model)), tmp_path / "wrapped")
    files = [load_file(place / WEIGHTS) for place in (folder, tmp_path / "wrapped")]
    assert files[0].keys() == files[1].keys()
    compiled = {f"_orig_mod.{name}": value for name, value in files[0].items()}
    save_file(compiled, tmp_path / "wrapped" / WEIGHTS)
    again = classifier_checkpoint.load(tmp_path / "wrapped").model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in files[0].items())


def test_what_is_not_finite_is_not_written(saved, tmp_path):
    made, _ = saved
    made.model.head.bias.fill_(math.inf)
    with pytest.raises(CheckpointError, match=r"not written: head.bias is not finite"):
        classifier_checkpoint.save(made, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_bad_files(saved, tmp_path):
    _, good = saved

    def broken(**changes):
        folder = shutil.copytree(good, tmp_path / f"bad-{len(list(tmp_path.iterdir()))}")
        facts = json.loads((folder / META).read_text())
        (folder / META).write_text(json.dumps({**facts, **changes}))
        return folder

    def weights(change):
        folder = broken()
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        return folder

    truncated, absent = broken(), broken()
    (truncated / WEIGHTS).write_bytes((truncated / WEIGHTS).read_bytes()[:500])
    (absent / WEIGHTS).unlink()
    shape = {"image_size": 8, "channels": 1, "widths": [16, 32], "layers_per_block": 1}
    for folder, message in (
        (tmp_path / "nowhere", "no classifier at .*: no such folder"),
        (tmp_path, "no classifier at .*: it has no classifier.json"),
        (broken(format=2), "format 2; this fastdiff reads format 1"),
        (broken(classes=["a"]), "a classifier needs 2 classes or more, got 1"),
        (broken(classes=["a", "b"]), "head.weight must have shape"),
        (broken(architecture={**shape, "depth": 3}), "unusable classifier.*'depth'"),
        (broken(architecture={**shape, "attention": [7]}), "attention level 7 does not exist"),
        (broken(architecture={**shape, "widths": "wide"}), "unusable classifier"),
        (broken(accuracy=[0.5]), "unusable classifier"),
        (broken(forward={"name": "edm", "options": {}}), "edm has the options"),
        (broken(step="two"), "'step' must be a int, got 'two'"),
        (truncated, "is damaged or no safetensors file"),
        (absent, "it has no classifier.safetensors"),
        (weights(lambda found: found.pop("head.bias")), "head.bias is missing"),
        (weights(lambda found: found["head.bias"].fill_(math.nan)), "head.bias has NaN"),
    ):
        with pytest.raises(CheckpointError, match=message):
            classifier_checkpoint.load(folder)


def test_what_fits(saved):
    found, _ = saved
    classifier_checkpoint.check_fits(found, checkpoint("edm"))
    classifier_checkpoint.check_fits(found, checkpoint("edm", classes=found.classes))
    for other, message in (
        (checkpoint("cosine"), r"was trained on EDM\(.*, the model on NoiseSchedule\('cosine'"),
        (checkpoint("edm", image_size=16), "images of size 8, the model has 16"),
        (checkpoint("edm", channels=3), "images of channels 1, the model has 3"),
        (checkpoint("edm", classes=("a", "b")), r"classes \('0', .*, the model has \('a', 'b'\)"),
    ):
        with pytest.raises(InputError, match=message):
            classifier_checkpoint.check_fits(found, other)
    narrower = replace(checkpoint("edm"), forward=sde.EDM(0.01, 50.0))
    with pytest.raises(InputError, match="sigma_max=50"):
        classifier_checkpoint.check_fits(found, narrower)


def test_data_that_does_not_fit(digits):
    with pytest.raises(InputError, match="a classifier needs images with labels"):
        ClassifierTrainer(checkpoint(), digits.without_labels(), SMALL)
    with pytest.raises(InputError, match="images of size 16, the model has 8"):
        ClassifierTrainer(checkpoint(), data.digits("train", 16))
    with pytest.raises(InputError, match="takes 1 x 8 x 8 images, the data has 1 x 16 x 16"):
        ClassifierTrainer(checkpoint(image_size=16), data.digits("train", 16), SMALL)
    trainer = ClassifierTrainer(checkpoint(), digits, SMALL)
    others = data.ImageSet(digits.images[:1], torch.tensor([0]), ("x",))
    with pytest.raises(InputError, match=r"must have the classes \('0', .*, got \('x',\)"):
        trainer.classifier(others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_options(options, message):
    with pytest.raises(InputError, match=message):
        ClassifierOptions(**options)


@pytest.mark.parametrize(("name", "method"), [("cosine", "ddim"), ("edm", "euler-maruyama")])
def test_guides_a_model_without_classes(name, method):
    """Towards the labels asked for, by a table of coefficients and in continuous time."""
    found, (trainer, _) = checkpoint(name), trained(name)
    guide, labels = trainer.classifier(), [3, 7] * 4
    sampler = found.diffusion().sampler(method, 20)
    share = []
    for scale in (0.0, 10.0):
        images = found.sample(
            sampler, labels=labels, classifier=guide, classifier_scale=scale,
            generator=torch.Generator().manual_seed(0), progress=False,
        )  # fmt: skip
        lowest = trainer.labels[0]
        share.append(guide(images, lowest).log_softmax(1)[range(8), labels].mean().item())
    assert share[1] > share[0] + 0.5
