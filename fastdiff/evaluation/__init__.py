"""How good generated images are: distances between sets of images, and measures of the digits.

:func:`compare` holds any set of images to a reference; :func:`evaluate` measures a model of the
digits, whose classes a classifier can tell.
"""

from __future__ import annotations

from fastdiff.evaluation.bits import Bits, measure_bits
from fastdiff.evaluation.comparison import Comparison, Figures, Reference, compare
from fastdiff.evaluation.digit_measures import Evaluation, evaluate, recogniser
from fastdiff.evaluation.distances import (
    Gaussian,
    frechet_distance,
    kernel_distance,
    nearest_distances,
)
from fastdiff.evaluation.drawing import balanced_labels, draw_in_batches, labels_like
from fastdiff.evaluation.inception import Inception
from fastdiff.evaluation.manifolds import Manifold
from fastdiff.evaluation.pictures import Pictures, thumbnails
from fastdiff.evaluation.principal_components import PrincipalComponents

__all__ = [
    "Bits",
    "Comparison",
    "Evaluation",
    "Figures",
    "Gaussian",
    "Inception",
    "Manifold",
    "Pictures",
    "PrincipalComponents",
    "Reference",
    "balanced_labels",
    "compare",
    "draw_in_batches",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "labels_like",
    "measure_bits",
    "nearest_distances",
    "recogniser",
    "thumbnails",
]
