"""Solvers from noise to images in continuous time: fixed steps, adaptive steps, ODEs."""

from __future__ import annotations

from fastdiff.sde.solvers.adaptive import solve_adaptive
from fastdiff.sde.solvers.by_name import Sampled, Solver
from fastdiff.sde.solvers.fixed_steps import solve, time_grid
from fastdiff.sde.solvers.langevin import annealed_langevin
from fastdiff.sde.solvers.ode import solve_ode
from fastdiff.sde.solvers.runge_kutta import Integrated, integrate

__all__ = [
    "Integrated", "Sampled", "Solver", "annealed_langevin", "integrate", "solve", "solve_adaptive",
    "solve_ode", "time_grid",
]  # fmt: skip
