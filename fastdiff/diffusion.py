"""``Diffusion``: a network, the process it belongs to, and what it predicts, in one object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff import generation, losses, objectives, samplers, sde
from fastdiff.common.checks import check_floating
from fastdiff.common.conditions import Conditions, unmarked
from fastdiff.common.errors import InputError
from fastdiff.common.estimates import SHARE, Unaided
from fastdiff.common.inputs import check_choice, checked_seeds, real_parameter
from fastdiff.common.model import Model
from fastdiff.generation import ModelArguments, Network, Samples
from fastdiff.losses.few_steps import FewSteps
from fastdiff.objectives import Forward, Objective
from fastdiff.samplers import Sampler
from fastdiff.schedules import GaussianPath, NoiseSchedule
from fastdiff.sde.solvers.by_name import METHODS as SOLVERS
from fastdiff.sde.solvers.rounding import tolerance_for

METHODS = (*samplers.names(), *SOLVERS)
# The sampler of models that are trained for a few steps, by their objective.
FEW_STEP_METHODS = {"consistency": "consistency", "progressive": "ddim", "reflow": "euler"}


class Diffusion:
    """A diffusion model: its loss, its samples and its likelihood.

    Args:
        model: any callable (x, t, **cond) -> prediction, as in ``fastdiff.sample``; with a learned
            variance it returns 2 C channels.
        forward: the forward process: a schedule from ``fastdiff.schedules``, which has timesteps,
            or a continuous process from ``fastdiff.sde``.
        prediction: what the model predicts: eps, x0, v, score or flow; in continuous time also
            ncsn or edm, see ``fastdiff.sde.score_fn``.
        objective: what the model is trained for, one of ``fastdiff.objectives.NAMES`` or an
            objective of this process and prediction; None for the default of the process.
        weighting: of the loss, see ``fastdiff.objectives.make``; None for the simple loss.
        timesteps: how the times of a batch are sampled, see ``fastdiff.objectives.make``.
        variance: of the model's reverse steps, see ``fastdiff.objectives.make``.
        levels: of noise, for the objective ncsn, see ``fastdiff.objectives.make``.
        self_condition: the model is self-conditioned (Chen et al. 2022, arXiv:2208.04202): it takes
            a keyword argument ``estimate``, its last estimate of x0, which training makes by a
            first pass for half of the images, and sampling carries from evaluation to evaluation.
            Scores, likelihoods and bounds are functions of x and t: there the estimate is 0.
        few_steps: steps that a model of consistency, progressive or reflow is meant to be sampled
            in; None for the objective's default.

    Attributes:
        objective: a :class:`fastdiff.objectives.Objective`.
        network: the model in the forms that samplers and solvers need, a
            :class:`fastdiff.generation.Network`.

    Raises:
        TypeError: ``forward`` is neither a schedule nor a continuous process.
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
        objective: str | Objective | None = None,
        weighting: str | None = None,
        timesteps: str | None = None,
        variance: str | None = None,
        levels: int | None = None,
        self_condition: bool = False,
        few_steps: int | None = None,
    ) -> None:
        if isinstance(objective, Objective):
            given = (weighting, timesteps, variance, levels, few_steps)
            _check_made(objective, forward, prediction, given)
            self.objective = objective
        else:
            self.objective = objectives.make(
                objective, forward, prediction, weighting=weighting, timesteps=timesteps,
                variance=variance, levels=levels, plan=FewSteps(few_steps),
            )  # fmt: skip
        self.model, self.forward, self.prediction = model, forward, prediction
        self.network = Network(model, forward, prediction, self.objective.learned, self_condition)

    def __repr__(self) -> str:
        return f"Diffusion({type(self.model).__name__}, {self.forward!r}, {self.prediction!r})"

    def loss(self, x0: Tensor, *, generator: torch.Generator | None = None, **cond: Any) -> Tensor:
        """The training loss of a batch, a scalar, at random times with random noise.

        Args:
            x0: clean images [N, C, ...], floating point.
            generator: on the CPU, the source of the times and of the noise's seed; None for
                PyTorch's global one.
            cond: keyword arguments of the model.
        """
        check_floating(x0, "x0")
        seed = torch.randint(2**63 - 1, (), generator=generator, device="cpu")
        seeds = checked_seeds(int(seed), None, x0.shape[0]).to(x0.device)
        t, weights = self.objective.draw(x0.shape[0], generator)
        t, model = t.to(x0.device), self.model
        if self.network.self_condition:
            estimated = torch.rand(x0.shape[0], generator=generator, device="cpu") < SHARE
            model = self.objective.aided(model, t, estimated)
        return self.objective.loss(model, x0, t, weights, seeds, **cond)

    def score(self, cond: ModelArguments | None = None) -> sde.Score:
        """grad log p_t(x) as a function of images [N, C, ...] and continuous times [N]."""
        network, plain = self.network, unmarked(cond or {})
        model = Unaided(network.predictor) if network.self_condition else network.predictor
        return sde.score_fn(model, self.prediction, network.continuous, **plain)

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
            method: a name from ``fastdiff.samplers``, which step along a fixed grid of timesteps,
                or of a method of ``sde.Solver``, which steps in continuous time. Both accept both
                kinds of process. None is the method of :data:`FEW_STEP_METHODS` for a model trained
                for a few steps, else unipc-2 for a schedule, and for a continuous process ode,
                which chooses its steps by a tolerance.
            steps: None is the objective's ``few_steps`` for that method of a model trained for a
                few, else 20 for a sampler, and for a solver its own default.
            options: of the sampler or the solver. The grid of that method is "trailing" if none is
                given.

        Raises:
            TypeError: an option that the method does not have.
            ValueError: an unknown method, options that the method refuses, or a solver for a
                schedule that has no view in continuous time.
        """
        method = method or self._default_method
        if method == FEW_STEP_METHODS.get(self.objective.name):
            steps = self.objective.few_steps if steps is None else steps
            options = {"grid": "trailing", **options}  # which progressive distillation trains on
        check_choice("method", method, METHODS)
        if method in SOLVERS:
            return sde.Solver(self.continuous, method, steps, **options)
        if method == "ddpm" and self.objective.variance is not None:
            options = {"variance": self.objective.variance, **options}
        options = {"prediction": self.network.path_prediction, **options}
        return samplers.make(method, self.path, 20 if steps is None else steps, **options)

    @property
    def _default_method(self) -> str:
        usual = "unipc-2" if isinstance(self.forward, GaussianPath) else "ode"
        return FEW_STEP_METHODS.get(self.objective.name, usual)

    def sample(
        self,
        shape: tuple[int, ...],
        *,
        method: str | None = None,
        steps: int | None = None,
        cond: ModelArguments | None = None,
        generator: torch.Generator | None = None,
        mode: str = "auto",
        progress: bool | str = True,
        **options: Any,
    ) -> Tensor:
        """Generate images.

        Args:
            shape: of the images, [N, C, ...].
            method: see :meth:`sampler`.
            steps: see :meth:`sampler`.
            cond: keyword arguments of the model, see :func:`fastdiff.generation.generate`.
            generator: source of all noise, None for PyTorch's global one.
            mode: of ``fastdiff.sample``; for a solver "auto" or "eager".
            progress: show a progress bar.
            options: of ``fastdiff.sample``, or of the solver.

        Returns:
            Images [N, C, ...], on the device of the model's parameters, or on the CPU if the model
            has none.
        """
        method = method or self._default_method
        solver = method in SOLVERS
        sampler = self.sampler(method, steps, **(options if solver else {}))
        return self.generate(
            sampler, shape, cond=cond, generator=generator, mode=mode, progress=progress,
            **({} if solver else options),
        ).images  # fmt: skip

    def generate(
        self, sampler: Sampler | sde.Solver, shape: Sequence[int], **options: Any
    ) -> Samples:
        """Generate images, and count the evaluations of the network.

        Args:
            sampler: from :meth:`sampler`.
            shape: of the images, [N, C, ...].
            options: other arguments of :func:`fastdiff.generation.generate`.
        """
        return generation.generate(self.network, sampler, shape, **options)

    draw = generate  # the name in earlier versions

    def encode(self, x: Tensor, **options: Any) -> Tensor:
        """The noise that leads to images x [N, C, ...]: see :func:`fastdiff.generation.encode`.

        ``generate(sampler, x.shape, x_T=noise)`` draws them again, by a sampler without noise.
        """
        return generation.encode(self.network, x, **options)

    def log_likelihood(
        self, x: Tensor, *, cond: ModelArguments | None = None, **options: Any
    ) -> sde.Likelihood:
        """log p(x) of images x [N, C, ...] by the probability-flow ODE.

        The tolerances default to what suits the coarser dtype of the images and the model. Images
        that are finished leave the batch, so tensors of ``cond`` with one row an image are cut; see
        ``cond`` of ``fastdiff.sample`` for how those tensors are recognised.

        Args:
            x: images [N, C, ...].
            cond: keyword arguments of the model.
            options: of ``fastdiff.sde.log_likelihood``.
        """
        parameter = real_parameter(self.model)
        tolerance = tolerance_for(x, x.dtype if parameter is None else parameter.dtype)
        options = {"rtol": tolerance, "atol": tolerance, **options}
        conditions = Conditions(cond or {}, None, x.shape[0], cut=True)
        score = self.network.score(conditions, carries=False)
        return sde.log_likelihood(score, self.continuous, x, conditioned=True, **options)

    def bits_per_dim(
        self,
        x0: Tensor,
        *,
        method: str | None = None,
        cond: ModelArguments | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Bits per value (bits/dim) of 8-bit images scaled to [-1, 1], float64 [N].

        Args:
            x0: images [N, C, ...] of 256 levels, -1 + 2 k / 255.
            method: "bound", the variational bound (the default for a NoiseSchedule, and for no
                other process), or "ode", the likelihood of uniformly dequantised images.
            cond: keyword arguments of the model.
            generator: source of the dequantisation noise ("ode"); None for PyTorch's global one.
            options: of ``fastdiff.losses.bits_per_dim`` ("bound") or of
                ``fastdiff.sde.log_likelihood`` ("ode").

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
            model = Unaided(self.model) if self.network.self_condition else self.model
            bound = losses.bits_per_dim(
                model, self.forward, x0, kind=self.prediction, **options, **dict(cond or {})
            )
            return bound.total.double()
        dequantized = sde.dequantize(x0, generator=generator)
        return sde.bits_per_dim(
            self.log_likelihood(dequantized, cond=cond, **options).logp, x0.shape[1:]
        )


def _check_made(
    objective: Objective, forward: Forward, prediction: str, options: tuple[Any, ...]
) -> None:
    """InputError unless an objective is of a process and a prediction, and has all its options."""
    if objective.forward is not forward or objective.prediction != prediction:
        raise InputError(
            f"the objective was made for {objective.prediction} of {objective.forward!r}, "
            f"got {prediction} of {forward!r}"
        )
    if any(option is not None for option in options):
        raise InputError(f"an objective that is made takes no further options, got {options}")
