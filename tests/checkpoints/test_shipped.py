"""The models that come along are small, load in both libraries and draw what they are asked for."""

from __future__ import annotations

import pytest
import torch

from fastdiff import data, samplers
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import PRETRAINED
from fastdiff.evaluation import evaluate


@pytest.fixture(scope="module")
def digits():
    return checkpoint.load("digits")


@pytest.fixture(scope="module")
def emoji():
    return checkpoint.load("emoji")


@pytest.mark.parametrize(
    ("name", "megabytes", "more"), [("digits", 5, set()), ("emoji", 10, {"README.md"})]
)
def test_is_small_and_without_training_state(name, megabytes, more) -> None:
    files = {file.name: file.stat().st_size for file in (PRETRAINED / name).iterdir()}
    assert sum(files.values()) <= megabytes * 1_000_000
    assert set(files) == {checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.META} | more


@pytest.mark.parametrize("name", checkpoint.shipped())
def test_diffusers_reads_it(name) -> None:
    diffusers = pytest.importorskip("diffusers")
    ours = checkpoint.load(name)
    theirs = diffusers.UNet2DModel.from_pretrained(PRETRAINED / name, torch_dtype=torch.float32)
    x = torch.randn(3, ours.channels, ours.image_size, ours.image_size)
    t, labels = torch.tensor([1, 500, 999]), torch.tensor([3, 0, 8])
    with torch.no_grad():
        wanted = theirs(x, t, class_labels=labels).sample
        torch.testing.assert_close(ours.model(x, t, labels), wanted, atol=1e-5, rtol=1e-5)


def test_likelihoods_end_soon(digits) -> None:
    """Of a digit, and of plain noise, which it has never seen, at the default tolerance."""
    digit = data.digits("test", 16).images[:1]
    x = torch.cat([digit, torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))])
    labels = {"class_labels": torch.tensor([0, 1])}
    found = digits.diffusion().log_likelihood(x, cond=labels, progress=False)
    assert bool(found.logp.isfinite().all())
    assert found.evaluations.max() < 300


def test_draws_the_digits_it_is_asked_for(digits) -> None:
    sampler = samplers.DDIM(digits.forward, 20, prediction=digits.prediction)
    found = evaluate(digits, sampler, samples=100, progress=False)
    assert found.accuracy >= 0.9
    assert found.nearest_train_median > 0.75 * found.nearest_train_median_real  # no copies


def test_draws_the_emoji_it_is_asked_for(emoji) -> None:
    """On white; faces are yellow, and guidance makes more of them so."""
    faces = emoji.classes.index("smileys-emotion")
    shares = {}
    for guidance in (0.0, 3.0):  # without the class, and with more of it
        sampler = samplers.DDIM(emoji.forward, 10, prediction=emoji.prediction, grid="trailing")
        generator = torch.Generator().manual_seed(0)
        images = emoji.sample(
            sampler, labels=[faces] * 16, guidance=guidance, generator=generator, progress=False
        )
        assert images.shape == (16, 3, 32, 32)
        corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.median() > 0.9
        red, green, blue = images[:, :, 8:24, 8:24].unbind(1)
        shares[guidance] = float(((red > blue + 0.5) & (green > blue + 0.2)).float().mean())
    assert shares[3.0] > max(0.5, 2 * shares[0.0])
