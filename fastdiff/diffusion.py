"""``Diffusion``: a network, the process it belongs to, and what it predicts, in one object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff import generation, losses, objectives, samplers, sde
from fastdiff.common.checks import check_floating
from fastdiff.common.conditions import Conditions, unmarked
from fastdiff.common.inputs import checked_seeds, real_parameter
from fastdiff.common.model import Model
from fastdiff.generation import Drawn, Given, Network
from fastdiff.objectives import Forward
from fastdiff.samplers import Sampler
from fastdiff.samplers.sampler import check_choice
from fastdiff.schedules import GaussianPath, NoiseSchedule
from fastdiff.sde.solvers.by_name import METHODS as SOLVERS
from fastdiff.sde.solvers.rounding import tolerance_for

METHODS = (*samplers.names(), *SOLVERS)


class Diffusion:
    """What a diffusion model is: its loss, its samples and its likelihood.

    Args:
        model: any callable (x, t, **cond) -> prediction, as in ``fastdiff.sample``; with a learned
            variance it returns 2 C channels.
        forward: a schedule from ``fastdiff.schedules``, with timesteps, or a continuous process
            from ``fastdiff.sde``.
        prediction: what the model predicts: eps, x0, v, score or flow; in continuous time also
            ncsn or edm, see ``fastdiff.sde.score_fn``.
        objective: what it is trained for, one of ``fastdiff.objectives.NAMES``; None for the one
            natural to the process.
        weighting: of the loss, see ``fastdiff.objectives.make``; None is the simple loss.
        timesteps: how times are drawn, likewise.
        variance: of the model's steps, likewise.
        levels: of the objective ncsn, likewise.

    Attributes:
        objective: a :class:`fastdiff.objectives.Objective`.
        network: the model as samplers and solvers ask it.

    Raises:
        TypeError: ``forward`` is neither.
        InputError: options that do not fit the process or each other.

    Example:
        >>> diffusion = Diffusion(model, fastdiff.schedules.cosine(), "v")
        >>> diffusion.loss(x0, class_labels=labels).backward()
        >>> images = diffusion.sample((16, 3, 32, 32), cond={"class_labels": wanted})
        >>> bits = diffusion.bits_per_dim(x0)
    """

    def __init__(
        self,
        model: Model,
        forward: Forward,
        prediction: str = "eps",
        *,
        objective: str | None = None,
        weighting: str | None = None,
        timesteps: str | None = None,
        variance: str | None = None,
        levels: int | None = None,
    ) -> None:
        self.objective = objectives.make(
            objective, forward, prediction, weighting=weighting, timesteps=timesteps,
            variance=variance, levels=levels,
        )  # fmt: skip
        self.model, self.forward, self.prediction = model, forward, prediction
        self.network = Network(model, forward, prediction, self.objective.learned)

    def __repr__(self) -> str:
        return f"Diffusion({type(self.model).__name__}, {self.forward!r}, {self.prediction!r})"

    def loss(self, x0: Tensor, *, generator: torch.Generator | None = None, **cond: Any) -> Tensor:
        """The training loss of a batch, a scalar, at random times with random noise.

        Args:
            x0: clean images [N, C, ...], floating point.
            generator: source of times and of the noise's seed, on the CPU; None for the global one.
            cond: keyword arguments of the model.
        """
        check_floating(x0, "x0")
        seed = torch.randint(2**63 - 1, (), generator=generator, device="cpu")
        seeds = checked_seeds(int(seed), None, x0.shape[0]).to(x0.device)
        t, weights = self.objective.draw(x0.shape[0], generator)
        return self.objective.loss(self.model, x0, t.to(x0.device), weights, seeds, **cond)

    def score(self, cond: Given | None = None) -> sde.Score:
        """grad log p_t(x) as a function of images and continuous times."""
        network, plain = self.network, unmarked(cond or {})
        return sde.score_fn(network.predictor, self.prediction, network.continuous, **plain)

    @property
    def continuous(self) -> sde.SDE:
        """The process in continuous time; ValueError for schedules that have no such view."""
        return self.network.continuous

    @property
    def path(self) -> GaussianPath:
        """The process with timesteps, for ``fastdiff.samplers``."""
        return self.network.path

    def sampler(
        self, method: str | None = None, steps: int | None = None, **options: Any
    ) -> Sampler | sde.Solver:
        """A sampler of this model.

        Args:
            method: one of ``fastdiff.samplers``, on a fixed grid of timesteps, or of ``sde.Solver``
                in continuous time; both know both kinds of process. By default unipc-2 with a
                schedule and ode, to a tolerance, in continuous time.
            steps: None is 20 of a sampler, and the solver's own.
            options: of the sampler or the solver.

        Raises:
            TypeError: an option that the method does not have.
            ValueError: an unknown method, options that it refuses, or a solver for a schedule that
                has no view in continuous time.
        """
        if method is None:
            method = "unipc-2" if isinstance(self.forward, GaussianPath) else "ode"
        check_choice("method", method, METHODS)
        if method in SOLVERS:
            return sde.Solver(self.continuous, method, steps, **options)
        if method == "ddpm" and self.objective.variance is not None:
            options = {"variance": self.objective.variance, **options}
        options = {"prediction": self.network.path_prediction, **options}
        return samplers.make(method, self.path, 20 if steps is None else steps, **options)

    def sample(
        self,
        shape: tuple[int, ...],
        *,
        method: str | None = None,
        steps: int | None = None,
        cond: Given | None = None,
        generator: torch.Generator | None = None,
        progress: bool | str = True,
        **options: Any,
    ) -> Tensor:
        """Draw images.

        Args:
            shape: of the images, [N, C, ...].
            method: see :meth:`sampler`.
            steps: likewise.
            cond: keyword arguments of the model, see :func:`fastdiff.generation.draw`.
            generator: source of all noise, None for PyTorch's global one.
            progress: show a progress bar.
            options: of ``fastdiff.sample``, or of the solver.

        Returns:
            Images, on the model's device where it is a module, else on the CPU.
        """
        solver = method in SOLVERS or (method is None and isinstance(self.forward, sde.SDE))
        sampler = self.sampler(method, steps, **(options if solver else {}))
        return self.draw(
            sampler, shape, cond=cond, generator=generator, progress=progress,
            **({} if solver else options),
        ).images  # fmt: skip

    def draw(self, sampler: Sampler | sde.Solver, shape: Sequence[int], **options: Any) -> Drawn:
        """Draw images, and say what they took: see :func:`fastdiff.generation.draw`.

        Args:
            sampler: from :meth:`sampler`.
            shape: of the images, [N, C, ...].
            options: its other arguments.
        """
        return generation.draw(self.network, sampler, shape, **options)

    def log_likelihood(
        self, x: Tensor, *, cond: Given | None = None, **options: Any
    ) -> sde.Likelihood:
        """log p(x) by the probability-flow ODE, see ``fastdiff.sde.log_likelihood``.

        The tolerances are by default what suits the coarser dtype of the images and the model.
        Images that are finished leave the batch, so tensors of ``cond`` with one row an image are
        cut: see ``cond`` of ``fastdiff.sample`` for how it is told which those are.
        """
        own = real_parameter(self.model)
        usual = tolerance_for(x, x.dtype if own is None else own.dtype)
        options = {"rtol": usual, "atol": usual, **options}
        score = self.network.score(Conditions(cond or {}, None, x.shape[0], cut=True))
        return sde.log_likelihood(score, self.continuous, x, conditioned=True, **options)

    def bits_per_dim(
        self,
        x0: Tensor,
        *,
        method: str | None = None,
        cond: Given | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Bits a value that 8-bit images in [-1, 1] take, float64 [N].

        Args:
            x0: images [N, C, ...] of 256 levels, -1 + 2 k / 255.
            method: "bound", the variational bound (NoiseSchedules only, and their default), or
                "ode", the likelihood of uniformly dequantised images.
            cond: keyword arguments of the model.
            generator: of the dequantisation.
            options: of ``fastdiff.losses.bits_per_dim`` or ``fastdiff.sde.log_likelihood``.

        Raises:
            ValueError: an unknown method, or "bound" without a NoiseSchedule.
        """
        bounded = isinstance(self.forward, NoiseSchedule)
        method = method or ("bound" if bounded else "ode")
        if method not in ("bound", "ode") or (method == "bound" and not bounded):
            wanted = "bound or ode" if bounded else "ode"
            raise ValueError(f"method must be {wanted} with {self.forward!r}, got {method!r}")
        if method == "bound":
            assert isinstance(self.forward, NoiseSchedule)
            options = {"variance": self.objective.variance, **options}
            found = losses.bits_per_dim(
                self.model, self.forward, x0, kind=self.prediction, **options, **dict(cond or {})
            )
            return found.total.double()
        spread = sde.dequantize(x0, generator=generator)
        return sde.bits_per_dim(
            self.log_likelihood(spread, cond=cond, **options).logp, x0.shape[1:]
        )
