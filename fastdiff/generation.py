"""Generate images with a table sampler or an SDE solver, guided or not, and go back to noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdiff import sde
from fastdiff.common.checks import check_shape, wide_dtype
from fastdiff.common.conditions import Conditions, PerImage
from fastdiff.common.errors import InputError
from fastdiff.common.estimates import Unaided
from fastdiff.common.inputs import check_max_batch, real_parameter
from fastdiff.common.model import Model
from fastdiff.guidance import LogProb, Rule, classifier_guided, guided_score, log_prob_of
from fastdiff.guidance.carried_estimates import Estimates, self_conditioned
from fastdiff.guidance.contrast import contrasted
from fastdiff.guidance.levels import levels_at
from fastdiff.losses.prediction import predict
from fastdiff.objectives import Forward
from fastdiff.samplers import Sampler
from fastdiff.sampling import sample
from fastdiff.sampling.quick import quick
from fastdiff.sampling.terminal_snr import warn_of_image_at_the_beginning, warn_of_image_at_the_end
from fastdiff.schedules import GaussianPath
from fastdiff.sde.discretization import DiscretizedSDE
from fastdiff.sde.solvers.ode import IndexedScore

ModelArguments = Mapping[str, Any]
Classifier = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> logits
WITHOUT = "without"  # the keyword of the arguments that only a weaker model gets
LABELS = "labels"  # the keyword by which log_prob_of takes the wanted classes


@dataclass(frozen=True)
class Samples:
    """Generated images, and the evaluations of the network that they took.

    Attributes:
        images: [N, C, ...].
        evaluations: of the network for each image, int64 [N] on the CPU. Classifier-free guidance
            gives the network each image twice in one call; that counts as one evaluation.
    """

    images: Tensor
    evaluations: Tensor


@dataclass(frozen=True)
class Guide:
    """A classifier of noised images (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4).

    Attributes:
        classifier: (x, t) -> logits [N, K]; t is the time as the diffusion network is given it.
        labels: the wanted class of each image, int64 [N].
        scale: factor of the gradient of log p(label | x_t).
    """

    classifier: Classifier
    labels: Tensor
    scale: float = 1.0

    def log_prob(self, label: Callable[[Tensor], Tensor]) -> LogProb:
        """log p(labels | x, t); ``label`` turns the sampler's t into the classifier's."""

        def logits(x: Tensor, t: Tensor) -> Tensor:
            time = label(t)
            return self.classifier(
                x, time.to(wide_dtype(x.dtype)) if time.is_floating_point() else time
            )

        return log_prob_of(logits)


@dataclass(frozen=True)
class Contrast:
    """Guidance away from a weaker model, see ``fastdiff.guidance.contrast``.

    Attributes:
        rule: how the two predictions are combined, with the scale of the guidance.
        weaker: a model of the same process and kind of prediction, self-conditioned if the network
            is; None for the network itself with
            the arguments ``uncond``.
    """

    rule: Rule
    weaker: Model | None = None


@dataclass(frozen=True)
class Network:
    """A network and its forward process, in the forms that samplers and solvers need.

    Attributes:
        model: (x, t, **cond) -> prediction [N, C, ...], or [N, 2 C, ...] with a learned variance.
        forward: the forward process.
        prediction: what the model predicts.
        learned: whether the model also predicts its variance.
        self_condition: whether the model takes its last estimate of x0, as ``estimate``.
    """

    model: Model
    forward: Forward
    prediction: str
    learned: bool
    self_condition: bool = False

    @cached_property
    def continuous(self) -> sde.SDE:
        """The process in continuous time; ValueError for schedules that have no such view."""
        return sde.continuous(self.forward)

    @cached_property
    def path(self) -> GaussianPath:
        """The process with timesteps, for ``fastdiff.samplers``."""
        forward = self.forward
        return sde.discretize(forward) if isinstance(forward, sde.SDE) else forward

    @property
    def path_prediction(self) -> str:
        """The ``prediction`` that a sampler of :attr:`path` is made with."""
        if isinstance(self.path, DiscretizedSDE):
            return sde.on_path(self.model, self.prediction, self.path)[1]
        return self.prediction

    @cached_property
    def predictor(self) -> Model:
        """The model, its output cut to the prediction [N, C, ...] if it predicts a variance too."""
        return self._cut(self.model)

    def _cut(self, model: Model) -> Model:
        return _PredictionOnly(model) if self.learned else model

    def for_sampler(
        self, sampler: Sampler, guide: Guide | None = None, contrast: Contrast | None = None
    ) -> Model:
        """The model as ``fastdiff.sample`` calls it with this sampler.

        Args:
            sampler: of :attr:`path`.
            guide: None for no classifier guidance. Otherwise the labels are expected among the
                model's keyword arguments, as ``labels``.
            contrast: None for no weaker model. Otherwise arguments that only the weaker model gets
                are expected among the model's, in the dict ``without``.

        Returns:
            The model. If it is self-conditioned, it carries its estimates from call to call.

        Raises:
            ValueError: the sampler needs a learned variance that the model does not predict, or was
                made for another prediction.
        """
        if sampler.learned_variance and not self.learned:
            raise ValueError(f"{sampler!r} needs a learned variance, the model has none")
        model = self.model if sampler.learned_variance else self.predictor
        path, kind = sampler.schedule, self.prediction
        label: Callable[[Tensor], Tensor] = _unchanged
        weaker = self._cut(contrast.weaker) if contrast and contrast.weaker else model
        if isinstance(path, DiscretizedSDE):
            weaker, _ = sde.on_path(weaker, kind, path)
            model, kind = sde.on_path(model, kind, path)
            label = partial(_label_on_path, path)
        if sampler.prediction != kind:
            raise ValueError(
                f"the sampler was made for {sampler.prediction}, the model predicts {kind}"
            )
        if self.self_condition:  # each with estimates of its own
            model, weaker = (self_conditioned(part, path, kind=kind) for part in (model, weaker))
        if contrast is not None:
            model = contrasted(model, weaker, contrast.rule, partial(levels_at, path), kind)
        if guide is None:
            return model
        return classifier_guided(
            model, guide.log_prob(label), path, kind=kind, scale=guide.scale, arguments=(LABELS,)
        )

    def score(
        self,
        conditions: Conditions,
        guidance: float = 1.0,
        guide: Guide | None = None,
        contrast: Contrast | None = None,
        *,
        carries: bool = True,
    ) -> IndexedScore:
        """The guided score (x [M, C, ...], t [M], index [M]) -> [M, C, ...].

        Args:
            conditions: the model's arguments for all images; ``index`` holds the places among them
                of the M images that a call is for.
            guidance: scale of classifier-free guidance, used if ``conditions`` are joined.
            guide: classifier guidance, or None.
            contrast: guidance away from a weaker model, or None; the arguments that only the weaker
                model gets are the dict ``without`` of the conditions.
            carries: a self-conditioned model is given the last estimate of each image. Without it
                the estimate is 0, and the score a function of x and t.
        """
        continuous, model = self.continuous, self.predictor
        weaker = self._cut(contrast.weaker) if contrast and contrast.weaker else model
        rows = conditions.images * (2 if conditions.joined else 1)
        own, other = (self._scores(part, rows, carries) for part in (model, weaker))

        def score(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
            arguments = conditions.part(index)
            changed = arguments.pop(WITHOUT, {})
            places = torch.cat([index, index + conditions.images]) if conditions.joined else index
            plain = own(arguments, places)

            def guided(x: Tensor, t: Tensor) -> Tensor:
                if contrast is not None:
                    weak = other({**arguments, **changed}, places)
                    combined = contrasted(plain, weak, contrast.rule, continuous.levels, "score")
                    return cast(Tensor, combined(x, t))
                if not conditions.joined:
                    return plain(x, t)
                without, conditional = plain(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
                return torch.lerp(without, conditional, guidance)

            if guide is None:
                return guided(x, t)
            log_prob, labels = guide.log_prob(continuous.label), guide.labels[index]
            return guided_score(guided, log_prob, guide.scale, labels=labels)(x, t)

        return score

    def _scores(
        self, model: Model, rows: int, carries: bool
    ) -> Callable[[dict[str, Any], Tensor], sde.Score]:
        """(the model's arguments, its images' places among ``rows``) -> the score."""
        score_fn = partial(sde.score_fn, parametrisation=self.prediction, sde=self.continuous)
        if not (self.self_condition and carries):
            plain = Unaided(model) if self.self_condition else model
            return lambda arguments, places: score_fn(plain, **arguments)
        estimates = Estimates(self.continuous, rows)

        def score(arguments: dict[str, Any], places: Tensor) -> sde.Score:
            return estimates.carried(
                lambda estimate: score_fn(model, **arguments, estimate=estimate), places
            )

        return score


def generate(
    network: Network,
    sampler: Sampler | sde.Solver,
    shape: Sequence[int],
    *,
    x_T: Tensor | None = None,
    cond: ModelArguments | None = None,
    uncond: ModelArguments | None = None,
    guidance: float | Sequence[float] = 1.0,
    guide: Guide | None = None,
    contrast: Contrast | None = None,
    generator: torch.Generator | None = None,
    mode: str = "auto",
    max_batch: int | None = None,
    progress: bool | str = True,
    **options: Any,
) -> Samples:
    """Generate images, and count the evaluations of the network.

    Args:
        network: the network and its process.
        sampler: a sampler of ``network.path``, or a solver of ``network.continuous``.
        shape: of the images, [N, C, ...].
        x_T: standard normal noise of ``shape``, which is scaled to the process's prior; None for
            noise from ``generator``.
        cond: keyword arguments of the model, as in ``fastdiff.sample``. Solvers that choose their
            own steps (ode, adaptive) cut tensors with one row an image even without ``max_batch``,
            since images that are finished leave the batch.
        uncond: the same keywords without the condition, for classifier-free guidance.
        guidance: scale of classifier-free guidance: as in ``fastdiff.sample`` with a sampler, one
            number with a solver.
        guide: classifier guidance, or None.
        contrast: guidance away from a weaker model, in place of ``guidance``, or None. The weaker
            model gets ``uncond``, or if that is None ``cond``.
        generator: source of all noise, None for PyTorch's global one.
        mode: of ``fastdiff.sample``; for a solver "auto" or "eager".
        max_batch: most images at a time; None for all at once.
        progress: show a progress bar; a string is its title.
        options: further options of ``fastdiff.sample``; a solver has none.

    Raises:
        TypeError, ValueError, FloatingPointError: as ``fastdiff.sample``, ``sde.Solver.sample``
            and :meth:`Network.for_sampler` do.
    """
    shape, cond = tuple(shape), dict(cond or {})
    if contrast is not None:
        check_contrast(contrast, guidance, uncond, isinstance(sampler, Sampler))
        if uncond is not None:
            cond, uncond = {**cond, WITHOUT: per_image(uncond, shape[0])}, None
    if mode == "auto":
        network = replace(network, model=quick(network.model))
        if contrast is not None and contrast.weaker is not None:
            contrast = replace(contrast, weaker=quick(contrast.weaker))
    if isinstance(sampler, Sampler):
        if x_T is not None and not options.get("start"):  # without x_T, ``sample`` warns itself
            warn_of_image_at_the_beginning(sampler)
        labels = {} if guide is None else {LABELS: PerImage(guide.labels)}
        model = network.for_sampler(sampler, guide, contrast)
        images: Any = sample(
            model, sampler, shape, x_T=x_T, cond=cond | labels,
            uncond=None if uncond is None else {**uncond, **labels}, guidance=guidance,
            generator=generator, mode=mode, max_batch=max_batch, progress=progress, **options,
        )  # fmt: skip
        evaluations = torch.full(shape[:1], sampler.table.rows, dtype=torch.int64, device="cpu")
        return Samples(images, evaluations)
    if options:
        raise TypeError(f"a solver has no option {', '.join(map(repr, options))}")
    if mode not in ("auto", "eager"):
        raise ValueError(f"a solver's mode must be auto or eager, got {mode!r}")
    if not isinstance(guidance, (int, float)):
        raise ValueError(f"a solver takes one number for its guidance, got {guidance!r}")
    check_max_batch(max_batch)
    count = shape[0]
    size, guided = max(max_batch or count, 1), guidance != 1
    if guided and uncond is None:
        raise ValueError(f"guidance {guidance} needs the arguments without the condition, uncond")
    # A solver without a number of steps chooses its own: images that have arrived leave the batch.
    cut = size < count or sampler.steps is None
    conditions = Conditions(cond, uncond if guided else None, count, joined=guided, cut=cut)
    warn_of_image_at_the_end(network.path)
    if x_T is None:
        own = real_parameter(network.model)
        device = torch.device("cpu") if own is None else own.device
        x = sampler.prior(shape, generator=generator, device=device)
    else:
        x = x_T * sampler.sde.prior_std
    score = network.score(conditions, guidance, guide, contrast)
    parts = [
        sampler.sample(
            _from(score, first),
            x[first : first + size],
            conditioned=True,
            generator=generator,
            progress=progress,
        )
        for first in range(0, max(count, 1), size)
    ]
    return Samples(
        torch.cat([part.x for part in parts]), torch.cat([part.evaluations for part in parts])
    )


def encode(
    network: Network,
    x: Tensor,
    *,
    cond: ModelArguments | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    progress: bool = False,
) -> Tensor:
    """The noise from which a sampler without noise of its own draws these images again.

    Images are encoded by the probability-flow ODE (Song et al. 2021, arXiv:2011.13456, section
    4.3).

    Args:
        network: the network and its process.
        x: images [N, C, ...], floating point.
        cond: keyword arguments of the model; tensors with one row an image are cut.
        rtol: relative tolerance of a step; None depends on the dtype of x.
        atol: absolute tolerance of a step; None depends on the dtype of x.
        progress: show a progress bar.

    Returns:
        Noise like ``x``, near standard normal: the ``x_T`` of :func:`generate`.

    Raises:
        InputError: the network is self-conditioned, so that the way back is not the way there.
        TypeError, ValueError, FloatingPointError, StuckError: as ``sde.solve_ode`` does.
    """
    if network.self_condition:
        raise InputError(
            "a self-conditioned model cannot turn images into noise: what it predicts depends on "
            "its earlier predictions, so drawing from that noise would not give the images again"
        )
    score = network.score(Conditions(cond or {}, None, x.shape[0], cut=True))
    solved = sde.solve_ode(
        score, network.continuous, x, backward=False, rtol=rtol, atol=atol, conditioned=True,
        progress=progress,
    )  # fmt: skip
    return solved.x / network.continuous.prior_std


def draws_noise(sampler: Sampler | sde.Solver) -> bool:
    """Whether a sampler draws noise after that of its beginning."""
    if isinstance(sampler, Sampler):
        return sampler.table.needs_noise
    return sampler.method not in ("ode", "probability-flow")


def slerp(first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """Noise between two noises, on the great circle (Shoemake 1985; DDIM, arXiv:2010.02502, D.5).

    A straight line between two samples of a normal distribution passes through points too near to
    0. Where both lie on one line through 0, or one is 0, the straight line is taken.

    Args:
        first: noise [C, ...], the result at share 0.
        second: noise like ``first``, the result at share 1.
        shares: [S], in 0..1.

    Returns:
        [S, C, ...].

    Raises:
        ValueError: two shapes.
    """
    check_shape(second, first, "second")
    a, b = first.double().flatten(), second.double().flatten()
    cosine = (a @ b / (a.norm() * b.norm()).clamp(min=torch.finfo(torch.float64).tiny)).clamp(-1, 1)
    angle, share = torch.acos(cosine), shares.to(a).unsqueeze(1)
    if angle.sin() < 1e-6 or not (bool(a.any()) and bool(b.any())):
        between = torch.lerp(a, b, share)
    else:
        between = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    return between.view(-1, *first.shape).to(first.dtype)


def check_contrast(
    contrast: Contrast, guidance: Any, uncond: ModelArguments | None, stepwise: bool
) -> None:
    """InputError unless a contrast fits the other arguments of :func:`generate`."""
    if guidance != 1:
        raise InputError(f"a contrast has a scale of its own, got guidance {guidance}, too")
    if contrast.weaker is None and uncond is None:
        raise InputError("a contrast needs a weaker model, or uncond for the network itself")
    if contrast.rule.momentum and not stepwise:
        raise InputError("momentum is for samplers with timesteps: a solver's steps may go back")


def per_image(arguments: ModelArguments, images: int) -> dict[str, Any]:
    """The arguments, their unmarked tensors with one row an image marked as such."""

    def marked(value: Any) -> Any:
        rows = isinstance(value, Tensor) and value.shape[:1] == (images,)
        return PerImage(value) if rows else value

    return {name: marked(value) for name, value in arguments.items()}


# The names in earlier versions.
Drawn = Samples
draw = generate


class _PredictionOnly(nn.Module):
    """The first C of the 2 C channels of a model that also predicts its variance."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.train(model.training if isinstance(model, nn.Module) else False)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        prediction, _ = predict(self.model, x, t, cond, learned=True)
        return prediction.to(x.dtype)


def _unchanged(t: Tensor) -> Tensor:
    """A sampler's t, which a network of timesteps is given as it is."""
    return t


def _label_on_path(path: DiscretizedSDE, t: Tensor) -> Tensor:
    """What a network of continuous time is given for its time at a path's timesteps t."""
    return path.sde.label(path.time(t))


def _from(score: IndexedScore, first: int) -> IndexedScore:
    """The score of the images from number ``first`` on, with places counted from there."""
    return lambda x, t, index: score(x, t, index + first)
