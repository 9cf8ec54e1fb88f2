"""Quality of generated digits: class accuracy, Frechet distance, distance to the training data.

Each figure is computed for generated digits and also for held-out real digits. The latter is the
score of a perfect model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import InputError, check_memory, require
from fastdiff.common.model import Model
from fastdiff.common.world import World
from fastdiff.data.datasets import ImageSet, digits
from fastdiff.evaluation.distances import frechet_distance, nearest_distances
from fastdiff.evaluation.principal_components import PrincipalComponents
from fastdiff.generation import Classifier
from fastdiff.samplers import Sampler
from fastdiff.sde import Solver


@dataclass(frozen=True)
class Evaluation:
    """Figures for generated digits; names that end in ``_real`` are for held-out real digits.

    Attributes:
        accuracy: share of the digits in which an independent classifier sees the requested class.
        frechet: Frechet distance to the training digits, see :class:`PrincipalComponents`.
        nearest_train_median: median over images of the Euclidean distance to the nearest training
            digit, of pixels in [-1, 1]. Copies of training digits would have distance 0.
        nearest_train_min: smallest such distance, over as many generated as held-out digits.
        samples: number of generated digits.
        seconds: time it took to generate them.
        evaluations: of the network for one digit, on average.
    """

    accuracy: float
    accuracy_real: float
    frechet: float
    frechet_real: float
    nearest_train_median: float
    nearest_train_median_real: float
    nearest_train_min: float
    nearest_train_min_real: float
    samples: int
    seconds: float
    evaluations: float

    def as_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def recogniser(train: ImageSet) -> Any:
    """A support vector machine with RBF kernel, fitted on real images; deterministic."""
    assert train.labels is not None
    svm = require("sklearn.svm").SVC(C=10.0)
    return svm.fit(_flat(train.images), train.labels.numpy())


def evaluate(
    checkpoint: Checkpoint,
    sampler: Sampler | Solver,
    *,
    samples: int = 1000,
    guidance: float = 1.0,
    classifier: Classifier | None = None,
    classifier_scale: float = 1.0,
    weaker: Model | None = None,
    projection: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    world: World | None = None,
) -> Evaluation:
    """Generate equally many digits of each class, and measure them and the held-out real digits.

    The Frechet distance is the mean over disjoint sets of generated digits, each as large as the
    held-out set, so that generated and held-out digits have the same bias. With fewer samples than
    held-out digits, the held-out set is cut to the number of samples.

    Args:
        checkpoint: a class-conditional model of the digits.
        sampler: of this model, from ``checkpoint.diffusion().sampler``.
        samples: digits to generate, at least 100.
        guidance: scale of classifier-free guidance.
        classifier: guides each digit to its class, see ``Checkpoint.generate``.
        classifier_scale: factor of the classifier's gradient.
        weaker: a model that ``guidance`` leads away from, see ``Checkpoint.generate``.
        projection: options of adaptive projected guidance, see ``Checkpoint.generate``.
        seed: of the noise.
        progress: show a progress bar on standard error.
        world: processes that share the generation, see ``Checkpoint.generate``.

    Raises:
        InputError: the model is not a class-conditional model of the digits or generates values
            that are not finite, samples are too few, or scikit-learn is not installed.
    """
    if samples < 100:
        raise InputError(f"samples must be at least 100, got {samples}")
    check_digits(checkpoint)
    check_memory(samples, 1, checkpoint.image_size, checkpoint.image_size)
    train = digits("train", checkpoint.image_size)
    test = digits("test", checkpoint.image_size)
    assert train.labels is not None
    assert test.labels is not None
    labels = [i % 10 for i in range(samples)]  # every run of consecutive images is balanced
    begin = time.perf_counter()
    generated = checkpoint.generate(
        sampler,
        labels=labels,
        guidance=guidance,
        classifier=classifier,
        classifier_scale=classifier_scale,
        weaker=weaker,
        projection=projection,
        generator=torch.Generator().manual_seed(seed),
        progress="generating digits" if progress else False,
        world=world,
    )
    seconds = time.perf_counter() - begin
    images = generated.images
    if not bool(torch.isfinite(images).all()):
        raise InputError("the model generates images that are not finite")
    svm, features = recogniser(train), PrincipalComponents(train.images)
    of_train, of_test, of_generated = (features(x) for x in (train.images, test.images, images))
    size = min(len(test), samples)
    sets = [of_generated[i * size : (i + 1) * size] for i in range(samples // size)]
    near = nearest_distances(images, train.images)
    near_real = nearest_distances(test.images, train.images)
    return Evaluation(
        accuracy=float((svm.predict(_flat(images)) == np.array(labels)).mean()),
        accuracy_real=float((svm.predict(_flat(test.images)) == test.labels.numpy()).mean()),
        frechet=float(np.mean([frechet_distance(part, of_train) for part in sets])),
        frechet_real=frechet_distance(_evenly_spaced(of_test, size), of_train),
        nearest_train_median=float(np.median(near)),
        nearest_train_median_real=float(np.median(near_real)),
        nearest_train_min=float(near[:size].min()),
        nearest_train_min_real=float(_evenly_spaced(near_real, size).min()),
        samples=samples,
        seconds=seconds,
        evaluations=float(generated.evaluations.double().mean()),
    )


def check_digits(checkpoint: Checkpoint) -> None:
    """InputError unless a model is a class-conditional model of digits of 8x8 or more."""
    if checkpoint.dataset != "digits" or len(checkpoint.classes) != 10:
        raise InputError(
            "evaluation needs a class-conditional model of the digits, got a model of "
            f"{checkpoint.dataset or 'unknown data'!r} with {len(checkpoint.classes)} classes"
        )
    if checkpoint.image_size < 8:
        raise InputError(
            f"evaluation needs digits of 8x8 pixels or more, got {checkpoint.image_size}"
        )


def _flat(images: Tensor) -> np.ndarray:
    """Images [N, ...] as float64 [N, D]."""
    return images.detach().cpu().flatten(1).double().numpy()


def _evenly_spaced(values: np.ndarray, size: int) -> np.ndarray:
    """``size`` of the values, at evenly spaced places."""
    return values[np.linspace(0, len(values) - 1, size).round().astype(int)]
