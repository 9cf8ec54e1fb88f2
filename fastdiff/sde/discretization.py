"""Conversion between schedules with timesteps and SDEs in continuous time.

:func:`continuous` gives the SDE of a schedule. :func:`discretize` places timesteps along an SDE, so
that every sampler of ``fastdiff.samplers`` can run it as a table of coefficients: the
probability-flow ODE or the sampler's own SDE, on a fixed grid. :func:`on_path` converts a network
of the SDE to one of these timesteps.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.common.checks import beside, wide_dtype
from fastdiff.common.inputs import whole_number
from fastdiff.common.model import Model
from fastdiff.common.per_device import PerDevice
from fastdiff.process import KINDS
from fastdiff.schedules import FlowSchedule, GaussianPath, NoiseSchedule
from fastdiff.sde.processes import EDM, SDE
from fastdiff.sde.processes.from_schedule import Interpolated, Straight
from fastdiff.sde.score import check_parametrisation, model_output
from fastdiff.sde.solvers.fixed_steps import time_grid


def continuous(forward: GaussianPath | SDE) -> SDE:
    """A forward process as an SDE in continuous time.

    Args:
        forward: an SDE is returned as it is, a :class:`DiscretizedSDE` gives its SDE, a
            :class:`~fastdiff.schedules.NoiseSchedule` gives :class:`Interpolated`, and a
            :class:`~fastdiff.schedules.FlowSchedule` gives :class:`Straight`.

    Raises:
        ValueError: another kind of process, or a NoiseSchedule with zero terminal SNR.
    """
    if isinstance(forward, SDE):
        return forward
    if isinstance(forward, DiscretizedSDE):
        return forward.sde
    if isinstance(forward, NoiseSchedule):
        return Interpolated(forward)
    if isinstance(forward, FlowSchedule):
        return Straight(forward.num_timesteps, forward.shift, label_by=forward.label_by)
    raise ValueError(f"{forward!r} has no view in continuous time")


class DiscretizedSDE(GaussianPath):
    """The marginals of an SDE at T of its times.

    Timestep 0 is at time ``sde.smallest`` and T - 1 at ``sde.end``. The timesteps between are
    spaced as by :func:`fastdiff.sde.time_grid`: evenly in t or, for ``EDM``, in its 7th root.

    Args:
        sde: the process.
        num_timesteps: T, at least 2.

    Attributes:
        times: the SDE's time at each timestep, float64 [T], increasing.
        extends: whether timesteps below 0 and above T - 1 have a time of the SDE, too.

    Raises:
        TypeError: T is no whole number.
        ValueError: T below 2.
    """

    def __init__(self, sde: SDE, num_timesteps: int = 1000) -> None:
        if whole_number(num_timesteps, "num_timesteps") < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}")
        self.sde, self.extends = sde, sde.extends
        self.times = time_grid(sde, num_timesteps - 1).flip(0)
        self.alpha_t, self.sigma_t = sde.levels(self.times)

    def __repr__(self) -> str:
        return f"DiscretizedSDE({self.sde!r}, num_timesteps={self.num_timesteps})"

    def levels(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """The alpha and sigma of the SDE at which sigma / alpha is ``ratio``."""
        return self.sde.levels_at(ratio)

    def time(self, t: Tensor) -> Tensor:
        """The SDE's time at timesteps, fractions allowed; float64, shaped like ``t``.

        Between two timesteps log(sigma / alpha) is linear in t, as for the grids of samplers. If
        the path extends, it is extrapolated linearly beyond 0..T-1, else times are clamped to
        smallest..end of the SDE.
        """
        if t.device not in self._lambdas:
            self._lambdas[t.device] = self.lambda_t.to(t.device)
        lam = self._lambdas[t.device]
        low = t.long().clamp(0, self.num_timesteps - 2)
        ratio = torch.exp(-torch.lerp(lam[low], lam[low + 1], t.double() - low))
        time = self.sde.time_at(ratio)
        return time if self.extends else time.clamp(self.sde.smallest, self.sde.end)

    @cached_property
    def _lambdas(self) -> PerDevice[torch.device, Tensor]:
        """lambda_t on each device, cached: a CUDA graph cannot capture a copy from the host."""
        return PerDevice()


def discretize(sde: SDE, num_timesteps: int = 1000) -> DiscretizedSDE:
    """An SDE as a path with timesteps, for ``fastdiff.samplers``: see :class:`DiscretizedSDE`."""
    return DiscretizedSDE(sde, num_timesteps)


def on_path(model: Model, parametrisation: str, path: DiscretizedSDE) -> tuple[nn.Module, str]:
    """A network of continuous time for ``fastdiff.sample`` with a sampler of ``path``.

    Args:
        model: the network, see :func:`fastdiff.sde.score_fn`.
        parametrisation: what the network returns, see :func:`fastdiff.sde.score_fn`.
        path: the SDE that the network was trained on, discretized.

    Returns:
        A model ``(x, t, **cond)`` -> prediction, t being a timestep of the path, fractions allowed;
        and the kind of its prediction, for the sampler's argument ``prediction``. The kind is the
        parametrisation if that is in ``process.KINDS``, eps for "ncsn", and x0 for "edm".

    Raises:
        ValueError: an unknown parametrisation, or one that does not fit the SDE.

    Example:
        >>> path = sde.discretize(sde.EDM())
        >>> model, kind = sde.on_path(network, "edm", path)
        >>> sampler = fastdiff.samplers.make("heun", path, 18, prediction=kind)
        >>> images = fastdiff.sample(model, sampler, (16, 3, 32, 32))
    """
    check_parametrisation(parametrisation, path.sde)
    kind = {"ncsn": "eps", "edm": "x0"}.get(parametrisation, parametrisation)
    return _OnPath(model, parametrisation, path), kind


class _OnPath(nn.Module):
    """The model of :func:`on_path`; an ``nn.Module``, so that sampling finds the model's device."""

    def __init__(self, model: Model, parametrisation: str, path: DiscretizedSDE) -> None:
        super().__init__()
        self.model, self.parametrisation, self.path = model, parametrisation, path
        self.train(model.training if isinstance(model, nn.Module) else False)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        sde, time = self.path.sde, self.path.time(t)
        if self.parametrisation in KINDS:
            label = sde.label(time).to(wide_dtype(x.dtype))
            return self.model(x, label.expand(x.shape[0]), **cond)
        if self.parametrisation == "ncsn":  # sigma times the score, which is -eps
            _, sigma = sde.levels(time)
            return -model_output(self.model, x, sigma, cond).to(x.dtype)
        assert isinstance(sde, EDM)  # on_path has checked
        skip, out, scale = (beside(value, x) for value in sde.preconditioning(time))
        output = model_output(self.model, (scale * x).to(x.dtype), sde.label(time), cond)
        return (skip * x + out * output).to(x.dtype)
