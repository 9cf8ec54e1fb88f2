"""Guidance beyond one constant scale.

``fastdiff.sample(guidance=)`` applies classifier-free guidance, inside the fused step. It takes one
scale per step: :func:`interval` and :func:`cfg_plus_plus` compute such scales. Every other guidance
wraps the model, so that it works with every sampler's table, and one can wrap another:

    contrast      away from a weaker model: autoguidance, adaptive projected guidance
    energies      along the gradient of a classifier or of any other energy
    mean_shift    the same gradient, added to the mean of a step
    measurements  towards what was measured of the image: inverse problems
    perturbed     weaker models: the network itself with perturbed attention
    levels        a function of the predicted x0

    carried_estimates    no guidance, but a network that takes its last estimate of x0
"""

from __future__ import annotations

from fastdiff.guidance.carried_estimates import self_conditioned
from fastdiff.guidance.contrast import (
    Linear,
    Projected,
    Rule,
    adaptive_projected,
    autoguided,
    guided_by_contrast,
)
from fastdiff.guidance.energies import (
    LogProb,
    classifier_guided,
    gradient_of,
    guided_score,
    log_prob_of,
)
from fastdiff.guidance.levels import denoised
from fastdiff.guidance.mean_shift import condition_mean
from fastdiff.guidance.measurements import (
    Measured,
    grey,
    pixels,
    posterior_sampling,
    pseudoinverse_guided,
    smaller,
)
from fastdiff.guidance.perturbed import perturbed_attention, smoothed_energy
from fastdiff.guidance.scales import cfg_plus_plus, interval

__all__ = [
    "Linear", "LogProb", "Measured", "Projected", "Rule", "adaptive_projected", "autoguided",
    "cfg_plus_plus", "classifier_guided", "condition_mean", "denoised", "gradient_of", "grey",
    "guided_by_contrast", "guided_score", "interval", "log_prob_of", "perturbed_attention",
    "pixels", "posterior_sampling", "pseudoinverse_guided", "self_conditioned",
    "smaller", "smoothed_energy",
]  # fmt: skip
