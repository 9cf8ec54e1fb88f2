"""Losses of discrete-time diffusion: T steps of a schedule, timesteps 0..T-1.

A loss function returns one number per image, [N], in float32 (float64 for float64 images), for the
caller to weight and average. The model is any callable (x_t, t, **cond) -> prediction, as in
``fastdiff.sample``. Noise is given as values or as seeds, see ``noising``.
"""

from __future__ import annotations

from fastdiff import _moved
from fastdiff.losses.bound import (
    BitsPerDim,
    bits_per_dim,
    bound_term,
    hybrid_loss,
    prior_term,
    rescaled_kl,
    vlb_loss,
)
from fastdiff.losses.consistency_loss import (
    consistency_loss,
    discretized_log_normal,
    intervals_at,
    karras_form,
    lcm_form,
    prediction_form,
)
from fastdiff.losses.densities import Cosh, Laplace
from fastdiff.losses.discretized_gaussian import discretized_gaussian_log_likelihood, normal_kl
from fastdiff.losses.first_estimate import with_first_estimate
from fastdiff.losses.jumps import ddim_jump
from fastdiff.losses.progressive_distillation import progressive_loss, progressive_target
from fastdiff.losses.simple import simple_loss
from fastdiff.losses.timesteps import (
    LogitNormal,
    LossSecondMoment,
    LowDiscrepancy,
    OfLogSNR,
    Uniform,
)
from fastdiff.losses.training_noise import assign_noise, offset_noise
from fastdiff.losses.variance import fixed_log_variance, model_variance
from fastdiff.losses.weights import convert, edm, min_snr, p2, snr, vlb, weighting

__all__ = [
    "BitsPerDim", "Cosh", "Laplace", "LogitNormal", "LossSecondMoment", "LowDiscrepancy",
    "OfLogSNR", "Uniform", "assign_noise", "bits_per_dim", "bound_term", "consistency_loss",
    "convert", "ddim_jump", "discretized_gaussian_log_likelihood", "discretized_log_normal", "edm",
    "fixed_log_variance", "hybrid_loss", "intervals_at", "karras_form", "lcm_form", "min_snr",
    "model_variance", "normal_kl", "offset_noise", "p2", "prediction_form", "prior_term",
    "progressive_loss", "progressive_target", "rescaled_kl", "simple_loss", "snr", "vlb",
    "vlb_loss", "weighting", "with_first_estimate",
]  # fmt: skip

_moved.attach(__name__)
