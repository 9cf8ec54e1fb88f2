"""The digits' own measures, with real digits in the place of samples."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastdiff import samplers, schedules
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import InputError
from fastdiff.data.datasets import digits
from fastdiff.evaluation import (
    Evaluation,
    evaluate,
    recogniser,
)
from fastdiff.generation import Samples

pytestmark = pytest.mark.usefixtures("one_thread")


# The classifier.


def test_the_recogniser_knows_held_out_digits():
    machine, test = recogniser(digits("train", 8)), digits("test", 8)
    predicted = machine.predict(test.images.flatten(1).double().numpy())
    assert (predicted == test.labels.numpy()).mean() > 0.98


# The whole evaluation, with checkpoints that "generate" what is put into them.


@dataclasses.dataclass
class Canned(Checkpoint):
    """A checkpoint whose samples are given images of the classes asked for, in turn."""

    source: object = None
    noise: float = 0.0

    def generate(self, sampler, *, labels=None, generator=None, **options):
        turn = dict.fromkeys(range(10), 0)
        drawn = []
        for label in labels:
            of_class = self.source.images[self.source.labels == label]
            drawn.append(of_class[turn[label] % len(of_class)])
            turn[label] += 1
        images = torch.stack(drawn)
        images = images + self.noise * torch.randn(images.shape, generator=generator)
        return Samples(images, torch.full((len(images),), 2))


@pytest.fixture
def canned(tiny_unet):
    model, schedule = tiny_unet(num_classes=10), schedules.cosine(10)
    classes = tuple("0123456789")

    def make(source, noise=0.0):
        return Canned(model, schedule, "v", classes, dataset="digits", source=source, noise=noise)

    return make


def run(found, **options):
    return evaluate(found, samplers.DDIM(found.forward, 2), progress=False, **options)


@pytest.mark.filterwarnings("error")
def test_held_out_digits_score_as_held_out_digits(canned):
    measured = run(canned(digits("test", 8)), samples=350)
    assert measured.samples == 350
    assert measured.accuracy > 0.98
    assert measured.accuracy == pytest.approx(measured.accuracy_real, abs=0.01)
    assert measured.frechet == pytest.approx(measured.frechet_real, rel=0.1)
    assert measured.nearest_train_median == pytest.approx(
        measured.nearest_train_median_real, rel=0.02
    )
    assert measured.nearest_train_min == pytest.approx(measured.nearest_train_min_real)
    assert measured.nearest_train_min > 0.1
    assert measured.seconds >= 0


def test_copied_training_digits_are_found_out(canned):
    """Perfect accuracy, a small Frechet distance, and no distance to the training set at all."""
    measured = run(canned(digits("train", 8)), samples=350)
    assert measured.accuracy > 0.99
    assert measured.nearest_train_median == 0
    assert measured.nearest_train_min == 0
    assert measured.nearest_train_median_real > 0.5


def test_noise_worsens_every_figure(canned):
    clean, noisy = (run(canned(digits("test", 8), noise), samples=350) for noise in (0.0, 0.8))
    assert noisy.accuracy < clean.accuracy - 0.02
    assert noisy.frechet > 5 * clean.frechet
    assert noisy.nearest_train_median > 2 * clean.nearest_train_median
    assert noisy.accuracy_real == clean.accuracy_real
    assert noisy.frechet_real == clean.frechet_real


def test_digits_of_the_wrong_class_are_found_out(canned):
    source = digits("test", 8)
    shifted = dataclasses.replace(source, labels=(source.labels + 1) % 10)
    assert run(canned(shifted), samples=200).accuracy < 0.05


def test_few_and_many_samples_are_compared_at_the_same_size(canned):
    """A hundred digits have a Frechet distance of their own; thousands are cut into sets."""
    few = run(canned(digits("test", 8)), samples=100)
    many = run(canned(digits("test", 8)), samples=1100)
    assert few.frechet_real > 1.5 * many.frechet_real
    # The first ten digits of each class are by fewer writers than ten from all over the set.
    assert few.frechet == pytest.approx(few.frechet_real, rel=0.5)
    assert many.frechet == pytest.approx(many.frechet_real, rel=0.1)


def test_an_untrained_model_is_told_apart(tiny_unet):
    model = tiny_unet(num_classes=10)
    found = Checkpoint(model, schedules.cosine(10), "v", tuple("0123456789"), dataset="digits")
    sampler = samplers.DDIM(found.forward, 2, prediction="v")
    first, again, other = (
        evaluate(found, sampler, samples=100, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert first.accuracy < 0.4
    assert first.frechet > 2 * first.frechet_real
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(again, seconds=0)
    assert first.frechet != other.frechet


def test_the_figures_are_plain_numbers():
    numbers = Evaluation(*[0.5] * 8, samples=100, seconds=1.0, evaluations=2.0).as_dict()
    assert list(numbers)[:4] == ["accuracy", "accuracy_real", "frechet", "frechet_real"]
    assert numbers["samples"] == 100


@pytest.mark.parametrize(
    ("changes", "samples", "message"),
    [
        pytest.param({}, 99, "at least 100, got 99", id="too few"),
        pytest.param({"dataset": "letters"}, 100, "'letters' with 10 classes", id="other data"),
        pytest.param({"dataset": ""}, 100, "'unknown data'", id="unknown data"),
        pytest.param({"classes": ()}, 100, "with 0 classes", id="unconditional"),
    ],
)
def test_what_cannot_be_evaluated(changes, samples, message, canned):
    found = dataclasses.replace(canned(digits("test", 8)), **changes)
    with pytest.raises(InputError, match=message):
        run(found, samples=samples)


def test_models_of_very_small_images(tiny_unet):
    small = Checkpoint(
        tiny_unet(image_size=4, num_classes=10),
        schedules.cosine(10),
        "v",
        tuple("0123456789"),
        dataset="digits",
    )
    with pytest.raises(InputError, match="8x8 pixels or more, got 4"):
        run(small)


def test_samples_that_are_not_finite(canned):
    with pytest.raises(InputError, match="not finite"):
        run(canned(digits("test", 8), noise=torch.inf), samples=100)
