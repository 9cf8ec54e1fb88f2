"""Quality of generated digits: class accuracy, Frechet distance, distance to the training data.

Each figure is computed for generated digits and also for held-out real digits. The latter is the
score of a perfect model.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.common.errors import InputError, check_memory, require
from fastdiff.data.datasets import ImageSet, digits
from fastdiff.generation import Classifier
from fastdiff.nn.wrappers import unwrapped
from fastdiff.samplers import Sampler
from fastdiff.schedules import FlowSchedule, NoiseSchedule
from fastdiff.sde import Solver

COMPONENTS = 32  # dimensions of the feature space


@dataclass(frozen=True)
class Evaluation:
    """Figures for generated digits; names that end in ``_real`` are for held-out real digits.

    Attributes:
        accuracy: share of the digits in which an independent classifier sees the requested class.
        frechet: Frechet distance to the training digits, see :class:`Features`.
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


class Features:
    """A fixed linear feature space: whitened principal components of the real training digits.

    Each of the first 32 components (about 97% of the variance) is scaled to variance 1, so that
    faint strokes and noise count as much as the shape of the figure. The features are
    deterministic, and the Frechet distance does not depend on the components' signs.

    Args:
        images: real images, [N, C, S, S], N at least 33.
    """

    def __init__(self, images: Tensor) -> None:
        flat = _flat(images)
        if len(flat) <= COMPONENTS:
            raise ValueError(f"wanted more than {COMPONENTS} images, got {len(flat)}")
        self.mean = flat.mean(0)
        values, vectors = np.linalg.eigh(np.cov(flat, rowvar=False))
        top = slice(-1, -COMPONENTS - 1, -1)
        self.projection = vectors[:, top] / np.sqrt(values[top])
        self.explained = float(values[top].sum() / values.sum())

    def __call__(self, images: Tensor) -> np.ndarray:
        """Features float64 [N, 32] of images [N, C, S, S]."""
        return (_flat(images) - self.mean) @ self.projection


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features.

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6).
    The estimate is biased upwards by about 1 / the size of the smaller set, so compare figures
    only of sets of the same size.

    Args:
        x: features [N, D], N at least 2.
        y: features [M, D], M at least 2.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features must be [N, D] and [M, D], got {x.shape} and {y.shape}")
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cov_x, cov_y = np.atleast_2d(cov_x), np.atleast_2d(cov_y)
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    # (C_x C_y)^(1/2) has the eigenvalues of (C_x^(1/2) C_y C_x^(1/2))^(1/2), which is symmetric.
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(min=0)).sum()
    mean_gap = x.mean(0) - y.mean(0)
    return float(mean_gap @ mean_gap + np.trace(cov_x) + np.trace(cov_y) - 2 * cross)


def nearest_distances(images: Tensor, others: Tensor) -> np.ndarray:
    """Euclidean distance of each image [N, C, S, S] to the nearest of ``others`` [M, C, S, S]."""
    distances = torch.cdist(
        torch.from_numpy(_flat(images)),
        torch.from_numpy(_flat(others)),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    return distances.amin(1).numpy()


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
    seed: int = 0,
    progress: bool = True,
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
        seed: of the noise.
        progress: show a progress bar on standard error.

    Raises:
        InputError: the model is not a class-conditional model of the digits or generates values
            that are not finite, samples are too few, or scikit-learn is not installed.
    """
    if samples < 100:
        raise InputError(f"samples must be at least 100, got {samples}")
    _check_digits(checkpoint)
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
        generator=torch.Generator().manual_seed(seed),
        progress="generating digits" if progress else False,
    )
    seconds = time.perf_counter() - begin
    images = generated.images
    if not bool(torch.isfinite(images).all()):
        raise InputError("the model generates images that are not finite")
    svm, features = recogniser(train), Features(train.images)
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


@dataclass(frozen=True)
class Bits:
    """Bits per value of held-out digits, rounded to 256 levels.

    Attributes:
        bits_bound: by the variational bound; None for a process that has no such bound.
        bits_ode: by the probability-flow ODE, of uniformly dequantised digits; None for a schedule
            that has no view in continuous time.
        bits_digits: number of digits.
    """

    bits_bound: float | None
    bits_ode: float | None
    bits_digits: int

    def as_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def measure_bits(
    checkpoint: Checkpoint,
    count: int = 16,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> Bits:
    """Bits per value that a model needs to code held-out digits: see :class:`Bits`.

    Args:
        checkpoint: a class-conditional model of the digits.
        count: number of held-out digits, evenly spaced in the set's order; all if there are fewer.
        rtol: relative tolerance of the ODE.
        atol: absolute tolerance of the ODE.
        seed: of the bound's noise, the dequantisation and the trace's probes.
        progress: show a progress bar on standard error.

    Raises:
        InputError: another kind of model.
    """
    _check_digits(checkpoint)
    test, diffusion = digits("test", checkpoint.image_size), checkpoint.diffusion()
    assert test.labels is not None
    count = min(count, len(test))
    chosen = torch.linspace(0, len(test) - 1, count, device="cpu").round().long()
    device = unwrapped(checkpoint.model).device
    x0 = (((test.images[chosen] + 1) * 127.5).round() / 127.5 - 1).to(device)
    cond = {"class_labels": test.labels[chosen].to(device)}
    bound = ode = None
    if isinstance(checkpoint.forward, NoiseSchedule):
        bits = diffusion.bits_per_dim(x0, method="bound", cond=cond, seed=seed, progress=progress)
        bound = float(bits.mean())
    if not diffusion.path.has_zero_terminal_snr or isinstance(checkpoint.forward, FlowSchedule):
        bits = diffusion.bits_per_dim(
            x0, method="ode", cond=cond, rtol=rtol, atol=atol, seed=seed, progress=progress,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        ode = float(bits.mean())
    return Bits(bound, ode, count)


def _check_digits(checkpoint: Checkpoint) -> None:
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
