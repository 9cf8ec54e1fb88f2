"""Training objectives: the distribution of training times, and the loss at these times.

    name    process        loss                                           source
    ddpm    NoiseSchedule  the (weighted) error of a prediction           arXiv:2006.11239, eq. 14
    hybrid  NoiseSchedule  ddpm's, and the bound for a learned variance   arXiv:2102.09672, eq. 16
    vlb     NoiseSchedule  the variational bound alone                    arXiv:2102.09672, eq. 4
    flow    FlowSchedule   the (weighted) error of a prediction           arXiv:2209.03003, eq. 1
    dsm     any SDE        denoising score matching in continuous time    arXiv:2011.13456, eq. 7
    ncsn    VE             score matching at geometric noise levels       arXiv:1907.05600, eq. 6
    edm     EDM            the error of the preconditioned denoiser       arXiv:2206.00364, eq. 8

and those of ``losses.few_steps``, consistency, progressive and reflow. ``fastdiff.losses`` computes
the losses. Trainer and Diffusion both train through :meth:`Objective.loss`. Only :func:`make`
checks whether process, prediction and options fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff import losses, process, sde
from fastdiff.common.errors import InputError
from fastdiff.common.inputs import check_choice
from fastdiff.common.model import Model
from fastdiff.losses import LossSecondMoment, score_matching
from fastdiff.losses import few_steps as few
from fastdiff.losses.continuous_times import DENSITIES, EVEN, Times, times_of
from fastdiff.losses.few_steps import FewSteps
from fastdiff.losses.timesteps import TimestepSampler
from fastdiff.samplers.ddpm import VARIANCES
from fastdiff.schedules import FlowSchedule, GaussianPath, NoiseSchedule

Forward = GaussianPath | sde.SDE


def _of_count(kind: Callable[[int], TimestepSampler], path: GaussianPath) -> TimestepSampler:
    return kind(path.num_timesteps)


DISCRETE: dict[str, Callable[[GaussianPath], TimestepSampler]] = {
    **{name: partial(_of_count, kind) for name, kind in EVEN.items()},
    # Biased on purpose: the papers' densities are meant to weight the loss.
    "logit-normal": lambda path: losses.LogitNormal(path.num_timesteps, unbiased=False),
    **{name: partial(losses.OfLogSNR, density=density) for name, density in DENSITIES.items()},
    "loss-second-moment": partial(_of_count, LossSecondMoment),
}
TIMESTEPS = (*DISCRETE, "log-normal")


class Objective:
    """A distribution of training times, and the loss of each image; made by :func:`make`.

    Attributes:
        name: one of :data:`NAMES`.
        forward: the forward process.
        prediction: what the model predicts.
        variance: the variance of the model's steps, for a NoiseSchedule, else None.
        levels: the number of noise levels of ncsn, else None.
        times: the sampler of training times.
        plan: of training for a few steps, with the teacher; None for other objectives.
    """

    def __init__(
        self,
        name: str,
        forward: Forward,
        prediction: str,
        times: Times,
        losses_of: Callable[..., Tensor],
        variance: str | None = None,
        levels: int | None = None,
        plan: FewSteps | None = None,
    ) -> None:
        self.name, self.forward, self.prediction = name, forward, prediction
        self.times, self.variance, self.levels, self.plan = times, variance, levels, plan
        self._losses_of = losses_of

    @property
    def learned(self) -> bool:
        """Whether the model returns 2 C channels, the second C for its variance."""
        return (self.variance or "").startswith("learned")

    @property
    def few_steps(self) -> int | None:
        """Steps that the model is meant to be sampled in, if it is trained for few; else None."""
        return None if self.plan is None else self.plan.few_steps

    def draw(
        self, n: int, generator: torch.Generator | None = None, step: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Times for n images, and the weights of their losses.

        Args:
            n: number of images.
            generator: on the CPU; None for PyTorch's global one.
            step: of the training, for consistency, whose times depend on it; None for its last.

        Returns:
            Timesteps int64 [n] for a schedule, or times float64 [n] for an SDE; for consistency and
            progressive the timesteps of each image's jump, int64 [n, 2] and [n, 3]. And the
            weights, float64 [n], on the generator's device.
        """
        times = self.times.at(step) if isinstance(self.times, few.Consistency) else self.times
        return times.draw(n, generator)

    def quantiles(self, shares: Tensor) -> Tensor:
        """Times below which given shares of all draws lie, each draw counted by its weight.

        The plain mean of the losses at evenly spread shares estimates the mean of :meth:`loss`
        without randomness. It does not depend on the losses that the sampler has recorded.

        Args:
            shares: float64 [n], in (0, 1).

        Returns:
            Times like those of :meth:`draw`, [n]: timesteps int64, or float64.
        """
        return self.times.quantiles(shares)

    def losses(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor, **cond: Any) -> Tensor:
        """The loss of each image, [N], float32 (float64 for float64 images).

        Args:
            model: (x_t, label, **cond) -> prediction; the label is that of ``forward``, as in
                sampling.
            x0: clean images [N, C, ...], floating point.
            t: times from :meth:`draw`, [N].
            noise: standard normal like ``x0``, or seeds int64 [N, 2], see ``losses.noising``.
            cond: keyword arguments of the model.
        """
        return self._losses_of(model, x0, t, noise, **cond)

    def loss(
        self, model: Model, x0: Tensor, t: Tensor, weights: Tensor, noise: Tensor, **cond: Any
    ) -> Tensor:
        """The weighted mean of :meth:`losses`, a scalar, whose losses are observed."""
        image_losses = self.losses(model, x0, t, noise, **cond)
        self.observe(t, image_losses)
        return (weights.to(image_losses.device, image_losses.dtype) * image_losses).mean()

    def aided(self, model: Model, t: Tensor, estimated: Tensor) -> Model:
        """A self-conditioned model for :meth:`losses` of a batch, its ``estimate`` filled in.

        Args:
            model: (x_t, label, *, estimate, **cond) -> prediction.
            t: the batch's times, [N].
            estimated: which images get the estimate of a first pass, bool [N], on the CPU; the
                others get zeros.
        """
        return losses.with_first_estimate(model, self.forward, self.prediction, t, estimated)

    def observe(self, t: Tensor, image_losses: Tensor) -> None:
        """Tell the sampler of times the losses of a batch; loss-second-moment records them.

        Nothing is recorded unless all losses are finite.

        Args:
            t: times of the whole batch, [N].
            image_losses: unweighted losses at these times, floating point [N].
        """
        if isinstance(self.times, LossSecondMoment):
            detached = image_losses.detach()
            if bool(detached.isfinite().all()):
                self.times.update(t, detached)

    def state_dict(self) -> dict[str, Any]:
        """The recorded losses of loss-second-moment, ready for JSON; {} for other samplers."""
        return self.times.state_dict() if isinstance(self.times, LossSecondMoment) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state_dict`; ValueError for the state of another objective."""
        if isinstance(self.times, LossSecondMoment):
            self.times.load_state_dict(state)
        elif state:
            raise ValueError(f"{self.name} keeps no losses of timesteps, the state has some")


def make(
    name: str | None,
    forward: Forward,
    prediction: str = "eps",
    *,
    weighting: str | None = None,
    timesteps: str | None = None,
    variance: str | None = None,
    levels: int | None = None,
    plan: FewSteps | None = None,
) -> Objective:
    """The objective called ``name``.

    Args:
        name: one of :data:`NAMES`. None depends on the process: ddpm (hybrid with a learned
            variance) for a NoiseSchedule, flow for a FlowSchedule, and for an SDE edm if the
            prediction is edm, else dsm.
        forward: a schedule with timesteps, or an SDE.
        prediction: one of ``process.KINDS``; for an SDE also ncsn or edm.
        weighting: weighting of the loss: for ddpm, flow and hybrid a name of ``losses.weighting``
            or None for weights of 1, for dsm sigma (the default) or likelihood, else None.
        timesteps: distribution of the times: for a schedule uniform, low-discrepancy, logit-normal,
            laplace, cosh or loss-second-moment, for EDM log-normal, laplace or cosh, for ncsn
            uniform, for dsm with other SDEs uniform, low-discrepancy, laplace or cosh. None is
            loss-second-moment for vlb, else the first of these.
        variance: for a NoiseSchedule one of ``samplers.ddpm.VARIANCES``; None is learned_range for
            hybrid and vlb, else fixed_small.
        levels: number of noise levels of ncsn, at least 2; None is 100.
        plan: of consistency, progressive and reflow, see ``losses.few_steps.FewSteps``; None for
            its defaults.

    Returns:
        The objective.

    Raises:
        TypeError: ``forward`` is neither a schedule nor an SDE.
        InputError: an unknown name, or options that do not fit together.
    """
    if not isinstance(forward, (GaussianPath, sde.SDE)):
        raise TypeError(f"forward must be a schedule or an SDE, got {type(forward).__name__}")
    try:
        name = name or _default_name(forward, prediction, variance)
        check_choice("objective", name, NAMES)
        if levels is not None and name != "ncsn":
            raise ValueError(f"levels are for the objective ncsn, not {name}")
        if name in few.NAMES:
            return _few_steps(
                name, forward, prediction, weighting, timesteps, variance, plan or FewSteps()
            )
        wanted = _FORWARDS[name]
        if not isinstance(forward, wanted):
            raise ValueError(f"the objective {name} needs {_describe(wanted)}, got {forward!r}")
        if isinstance(forward, sde.SDE):
            return _continuous(name, forward, prediction, weighting, timesteps, variance, levels)
        return _discrete(name, forward, prediction, weighting, timesteps, variance)
    except ValueError as error:
        raise InputError(str(error)) from None


_FORWARDS: dict[str, type[Forward]] = {
    "ddpm": NoiseSchedule,
    "hybrid": NoiseSchedule,
    "vlb": NoiseSchedule,
    "flow": FlowSchedule,
    "dsm": sde.SDE,
    "ncsn": sde.VE,
    "edm": sde.EDM,
}
NAMES = (*_FORWARDS, *few.NAMES)


def _default_name(forward: Forward, prediction: str, variance: str | None) -> str:
    if isinstance(forward, sde.SDE):
        return "edm" if prediction == "edm" else "dsm"
    if isinstance(forward, FlowSchedule):
        return "flow"
    return "hybrid" if (variance or "").startswith("learned") else "ddpm"


def _describe(kind: type[Forward]) -> str:
    return "an SDE" if kind is sde.SDE else f"the process {kind.__name__}"


def _discrete(
    name: str,
    forward: GaussianPath,
    prediction: str,
    weighting: str | None,
    times: str | None,
    variance: str | None,
) -> Objective:
    process.check_kind(prediction)
    if prediction in ("eps", "score") and forward.has_zero_terminal_snr:
        raise ValueError(
            f"{prediction} says nothing of x0 at zero signal-to-noise ratio; predict x0, v or flow "
            "with this schedule"
        )
    times = times or ("loss-second-moment" if name == "vlb" else "uniform")
    check_choice("timestep sampler", times, tuple(DISCRETE))
    if isinstance(forward, NoiseSchedule):
        variance = variance or ("learned_range" if name in ("hybrid", "vlb") else "fixed_small")
        check_choice("variance", variance, VARIANCES)
        learned = variance.startswith("learned")
        if name == "ddpm" and learned:
            raise ValueError(f"ddpm does not train a {variance} variance; hybrid and vlb do")
        if name == "hybrid" and not learned:
            raise ValueError(f"hybrid trains a learned variance, got {variance}")
    elif variance is not None:
        raise ValueError(f"{forward!r} has no steps whose variance could be {variance}")
    if name == "vlb" and weighting is not None:
        raise ValueError(f"vlb has weights of its own, got the weighting {weighting!r}")
    weight = None if weighting is None else losses.weighting(forward, prediction, weighting)

    losses_of = partial(_discrete_losses, name, forward, prediction, weight, variance)
    sampler = DISCRETE[times](forward)
    return Objective(name, forward, prediction, sampler, losses_of, variance)


def _few_steps(
    name: str,
    forward: Forward,
    prediction: str,
    weighting: str | None,
    times: str | None,
    variance: str | None,
    plan: FewSteps,
) -> Objective:
    if variance is not None and variance.startswith("learned"):
        raise ValueError(f"{name} does not train a {variance} variance; hybrid and vlb do")
    plan = replace(plan, few_steps=plan.few_steps or few.FEW_STEPS[name])
    if name == "reflow":  # rectified flow, of pairs
        base = make("flow", forward, prediction, weighting=weighting, timesteps=times)
        return Objective(name, forward, prediction, base.times, base.losses, plan=plan)
    for what, value in (("weights", weighting), ("times", times)):
        if value is not None:
            raise ValueError(f"{name} has {what} of its own, got {value!r}")
    if isinstance(forward, NoiseSchedule):
        variance = variance or "fixed_small"
    elif variance is not None:
        raise ValueError(f"{forward!r} has no steps whose variance could be {variance}")
    kind = few.Consistency if name == "consistency" else few.Progressive
    jumps = kind(forward, prediction, plan)
    return Objective(name, forward, prediction, jumps, jumps.losses, variance, plan=plan)


def _discrete_losses(
    name: str,
    forward: GaussianPath,
    prediction: str,
    weight: Tensor | None,
    variance: str | None,
    model: Model,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    /,
    **cond: Any,
) -> Tensor:
    if name in ("ddpm", "flow"):
        return losses.simple_loss(
            forward, model, x0, t, noise, kind=prediction, weight=weight, **cond
        )
    assert isinstance(forward, NoiseSchedule)
    assert variance is not None
    if name == "hybrid":
        return losses.hybrid_loss(
            forward, model, x0, t, noise, kind=prediction, variance=variance, weight=weight, **cond
        )
    return losses.rescaled_kl(
        forward, model, x0, t, noise, kind=prediction, variance=variance, **cond
    )


def _continuous(
    name: str,
    forward: sde.SDE,
    prediction: str,
    weighting: str | None,
    times: str | None,
    variance: str | None,
    levels: int | None,
) -> Objective:
    sde.score_fn(lambda x, t: x, prediction, forward)  # checks that prediction and process fit
    if variance is not None:
        raise ValueError(f"{forward!r} has no steps whose variance could be {variance}")
    if name == "dsm":
        check_choice("weighting", weighting or "sigma", score_matching.WEIGHTINGS)
        if isinstance(forward, sde.LearnedLogSNR):
            return _learned(forward, prediction, weighting, times)
        if prediction == "edm":
            raise ValueError("the prediction edm is trained by the objective edm, not dsm")
    else:
        if prediction != name:
            raise ValueError(f"{name} trains the prediction {name}, got {prediction}")
        if weighting is not None:
            raise ValueError(f"{name} has weights of its own, got the weighting {weighting!r}")
    sampler, levels = times_of(name, forward, times, levels)

    losses_of = partial(_continuous_losses, name, forward, prediction, weighting or "sigma")
    return Objective(name, forward, prediction, sampler, losses_of, levels=levels)


def _learned(
    forward: sde.LearnedLogSNR, prediction: str, weighting: str | None, times: str | None
) -> Objective:
    """dsm with a learned log-SNR: the diffusion loss of the bound, of which it must be a part."""
    if prediction != "eps" or weighting == "sigma":
        raise ValueError(
            f"{forward!r} is learned with the prediction eps and the weighting likelihood, the "
            f"default here, got {prediction} and {weighting}"
        )
    check_choice("timestep sampler with a learned log-SNR", times or "uniform", tuple(EVEN))
    sampler, _ = times_of("dsm", forward, times, None)

    def losses_of(model: Model, x0: Tensor, t: Tensor, noise: Tensor, **cond: Any) -> Tensor:
        return score_matching.diffusion_loss(
            model, forward, x0, t, noise, least_variance=True, **cond
        )

    return Objective("dsm", forward, prediction, sampler, losses_of)


def _continuous_losses(
    name: str,
    forward: sde.SDE,
    prediction: str,
    weighting: str,
    model: Model,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    /,
    **cond: Any,
) -> Tensor:
    if name == "edm":
        assert isinstance(forward, sde.EDM)
        return score_matching.edm_loss(model, forward, x0, t, noise, **cond)
    score = sde.score_fn(model, prediction, forward, **cond)
    if name == "ncsn":
        _, sigma = forward.levels(t)
        return score_matching.ncsn_loss(lambda x, _: score(x, t), x0, sigma, noise)
    return score_matching.denoising_score_matching(
        score, forward, x0, t, noise, weighting=weighting
    )
