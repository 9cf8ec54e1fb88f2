"""Runs on images that are read while the model trains: the same run as on images in memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import schedules
from fastdiff.common.errors import DataError
from fastdiff.data import image_loading, open_images
from fastdiff.data.lazy_images import LazyImages
from fastdiff.training import fingerprint as fingerprints
from fastdiff.training.fingerprint import fingerprint
from fastdiff.training.trainer import Trainer, TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = TrainingOptions(
    steps=5, batch_size=4, lr=1e-2, warmup=2, save_every=100, sample_every=0, seed=1
)


@pytest.fixture
def pictures(tmp_path):
    """A folder of nine 8x8 grey images of two classes."""
    rng = np.random.default_rng(0)
    for i in range(9):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def opened(folder, cache, **options):
    wanted = {"grayscale": True, "flip": True, "workers": 1, "progress": False, **options}
    return open_images(folder, 8, cache=cache, **wanted)


def same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def make_trainer(tiny_unet):
    """A function that makes a trainer, always with the same initial weights."""

    def make(data, out=None, **changes):
        options = dataclasses.replace(OPTIONS, **changes)
        return Trainer(tiny_unet(num_classes=2), schedules.cosine(50), data, options, out=out)

    return make


def test_a_run_is_that_on_images_in_memory(make_trainer, pictures, tmp_path):
    """Whole, and stopped and resumed with another cache; memory can take over from files."""
    whole = make_trainer(opened(pictures, 2**20))
    whole.run(progress=False)
    lazy = make_trainer(opened(pictures, 0))
    lazy.run(progress=False)
    assert same_weights(lazy.model, whole.model)
    stopped = make_trainer(opened(pictures, 0), tmp_path / "run")
    for _ in range(3):
        stopped.step()
    stopped.save()
    for cache in (300, 2**20):
        resumed = Trainer.resume(tmp_path / "run", opened(pictures, cache))
        assert isinstance(resumed.data, LazyImages) == (cache == 300)
        while resumed.finished_steps < 5:
            resumed.step()
        assert same_weights(resumed.model, whole.model)


def test_random_crops_are_the_same_when_a_run_is_resumed(make_trainer, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        path = tmp_path / "wide" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 20), dtype=np.uint8)).save(path)
    trainer = make_trainer(opened(tmp_path / "wide", 2**20, crop="random"), tmp_path / "run")
    draws = trainer.draw(2)
    assert draws.corners.shape == (4, 2)
    parts = [trainer.batch(draws.part(*ends)).x0 for ends in ((0, 1), (1, 4))]
    assert torch.equal(torch.cat(parts), trainer.batch(draws).x0)
    trainer.run(progress=False)
    stopped = make_trainer(opened(tmp_path / "wide", 0, crop="random"), tmp_path / "parts")
    for _ in range(2):
        stopped.step()
    stopped.save()
    again = opened(tmp_path / "wide", 0, crop="random")
    resumed = Trainer.resume(tmp_path / "parts", again)
    resumed.run(progress=False)
    assert same_weights(resumed.model, trainer.model)


def test_images_are_known_by_a_sample(make_trainer, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(image_loading, "SAMPLE", 3)
    monkeypatch.setattr(fingerprints, "SAMPLE", 3)
    lazy = opened(pictures, 0)
    found = fingerprint(lazy)
    assert found["sample"] == 3
    assert found["names"] == lazy.listing
    whole = opened(pictures, 2**20)
    assert fingerprint(whole, like=found)["sums"] == found["sums"]
    assert fingerprint(lazy, like=fingerprint(whole)) == fingerprint(whole)
    make_trainer(lazy, tmp_path / "run").save()
    first = pictures / "a" / "0.png"  # which is in the sample
    pixels = first.read_bytes()
    Image.new("L", (8, 8), 255).save(first)
    with pytest.raises(DataError, match="trained on other images"):
        Trainer.resume(tmp_path / "run", opened(pictures, 0))
    first.write_bytes(pixels)
    first.rename(first.with_name("00.png"))
    with pytest.warns(UserWarning, match="have other names .* 3 were compared, and are the same"):
        Trainer.resume(tmp_path / "run", opened(pictures, 0))


def test_a_file_that_goes_ends_a_run_with_its_name(make_trainer, pictures):
    trainer = make_trainer(opened(pictures, 0), steps=50)
    trainer.step()
    for path in pictures.rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"cannot read the image .*\.png: not a file"):
        trainer.run(progress=False)


def test_a_bad_loss_is_blamed_on_files(make_trainer, pictures):
    trainer = make_trainer(opened(pictures, 0), on_bad_loss="skip", max_skips=5)
    with torch.no_grad():
        next(trainer.network.parameters()).fill_(torch.nan)
    with pytest.warns(UserWarning, match=r"in images .*/pictures/[ab]/\d\.png, "):
        trainer.step()
