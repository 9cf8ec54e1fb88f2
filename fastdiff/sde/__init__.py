"""Diffusion in continuous time: SDEs, scores, solvers that generate images, and likelihoods."""

from __future__ import annotations

from fastdiff import _moved
from fastdiff.sde.discretization import DiscretizedSDE, continuous, discretize, on_path
from fastdiff.sde.likelihood import Likelihood, bits_per_dim, dequantize, log_likelihood
from fastdiff.sde.processes import (
    EDM,
    SDE,
    VE,
    VP,
    CosineLogSNR,
    LearnedLogSNR,
    LinearLogSNR,
    LogSNR,
    SubVP,
)
from fastdiff.sde.processes.from_schedule import Interpolated, Straight
from fastdiff.sde.reverse import Reverse, probability_flow, reverse
from fastdiff.sde.score import PARAMETRISATIONS, Score, prediction_fn, score_fn
from fastdiff.sde.solvers.adaptive import solve_adaptive
from fastdiff.sde.solvers.by_name import Sampled, Solver
from fastdiff.sde.solvers.fixed_steps import solve, time_grid
from fastdiff.sde.solvers.known_part import Known, known_grey, known_pixels
from fastdiff.sde.solvers.langevin import annealed_langevin
from fastdiff.sde.solvers.ode import solve_ode
from fastdiff.sde.solvers.runge_kutta import Integrated, integrate

__all__ = [
    "EDM", "PARAMETRISATIONS", "SDE", "VE", "VP", "CosineLogSNR", "DiscretizedSDE", "Integrated",
    "Interpolated", "Known", "LearnedLogSNR", "Likelihood", "LinearLogSNR", "LogSNR", "Reverse",
    "Sampled", "Score", "Solver", "Straight", "SubVP", "annealed_langevin", "bits_per_dim",
    "continuous", "dequantize", "discretize", "integrate", "known_grey", "known_pixels",
    "log_likelihood", "on_path", "prediction_fn", "probability_flow", "reverse", "score_fn",
    "solve", "solve_adaptive", "solve_ode", "time_grid",
]  # fmt: skip

_moved.attach(__name__)
