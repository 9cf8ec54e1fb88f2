"""From noise to images with either kind of sampler, guided or not, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import sde
from fastdiff.common.checks import wide_dtype
from fastdiff.common.conditions import Conditions, PerImage
from fastdiff.common.inputs import check_max_batch, real_parameter
from fastdiff.common.model import Model
from fastdiff.guidance import LogProb, classifier_guided, guided_score, log_prob_of
from fastdiff.losses.prediction import predict
from fastdiff.objectives import Forward
from fastdiff.samplers import Sampler
from fastdiff.sampling import sample
from fastdiff.sampling.terminal import warn_of_image_at_the_beginning, warn_of_image_at_the_end
from fastdiff.schedules import GaussianPath
from fastdiff.sde.path import DiscretizedSDE
from fastdiff.sde.solvers.ode import IndexedScore

Given = Mapping[str, Any]  # a model's keyword arguments
Classifier = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> logits
LABELS = "labels"  # the argument of log_prob_of


@dataclass(frozen=True)
class Drawn:
    """Images, and what they took.

    Attributes:
        images: [N, C, ...].
        evaluations: of the network for each image, int64 [N] on the CPU; the two that
            classifier-free guidance makes at once count as one.
    """

    images: Tensor
    evaluations: Tensor


@dataclass(frozen=True)
class Guide:
    """A classifier of noised images (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4).

    Attributes:
        classifier: (x, t) -> logits [N, K], t being what the diffusion network is given.
        labels: the class wanted of each image, int64 [N].
        scale: of the gradient of log p(label | x_t).
    """

    classifier: Classifier
    labels: Tensor
    scale: float = 1.0

    def log_prob(self, label: Callable[[Tensor], Tensor]) -> LogProb:
        """log p(labels | x, t), the classifier being given what ``label`` makes of t."""

        def logits(x: Tensor, t: Tensor) -> Tensor:
            given = label(t)
            return self.classifier(
                x, given.to(wide_dtype(x.dtype)) if given.is_floating_point() else given
            )

        return log_prob_of(logits)


@dataclass(frozen=True)
class Network:
    """A network and the process that it belongs to, as samplers and solvers ask it.

    Attributes:
        model: (x, t, **cond) -> prediction, of 2 C channels with a learned variance.
        forward: the forward process.
        prediction: what the model predicts.
        learned: its variance is learned.
    """

    model: Model
    forward: Forward
    prediction: str
    learned: bool

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
        """What the model predicts to a sampler of :attr:`path`."""
        if isinstance(self.path, DiscretizedSDE):
            return sde.on_path(self.model, self.prediction, self.path)[1]
        return self.prediction

    @cached_property
    def predictor(self) -> Model:
        """The model without its variance."""
        return _PredictionOnly(self.model) if self.learned else self.model

    def for_sampler(self, sampler: Sampler, guide: Guide | None = None) -> Model:
        """The model as ``fastdiff.sample`` wants it.

        Raises:
            ValueError: a sampler with a learned variance where the model has none, or one made for
                another prediction.
        """
        if sampler.learned_variance and not self.learned:
            raise ValueError(f"{sampler!r} needs a learned variance, the model has none")
        model = self.model if sampler.learned_variance else self.predictor
        path, kind = sampler.schedule, self.prediction
        if isinstance(path, DiscretizedSDE):
            model, kind = sde.on_path(model, kind, path)
        if sampler.prediction != kind:
            raise ValueError(
                f"the sampler was made for {sampler.prediction}, the model predicts {kind}"
            )
        if guide is None:
            return model

        def label(t: Tensor) -> Tensor:
            return path.sde.label(path.time(t)) if isinstance(path, DiscretizedSDE) else t

        return classifier_guided(
            model, guide.log_prob(label), path, kind=kind, scale=guide.scale, arguments=(LABELS,)
        )

    def score(
        self, conditions: Conditions, guidance: float = 1.0, guide: Guide | None = None
    ) -> IndexedScore:
        """The score, guided, of those of the conditions' images whose places come with them."""
        continuous, model = self.continuous, self.predictor

        def score(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
            some = conditions.part(index)
            of_cond = sde.score_fn(model, self.prediction, continuous, **some)

            def guided(x: Tensor, t: Tensor) -> Tensor:
                if not conditions.joined:
                    return of_cond(x, t)
                without, found = of_cond(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
                return torch.lerp(without, found, guidance)

            if guide is None:
                return guided(x, t)
            log_prob, labels = guide.log_prob(continuous.label), guide.labels[index]
            return guided_score(guided, log_prob, guide.scale, labels=labels)(x, t)

        return score


def draw(
    network: Network,
    sampler: Sampler | sde.Solver,
    shape: Sequence[int],
    *,
    x_T: Tensor | None = None,
    cond: Given | None = None,
    uncond: Given | None = None,
    guidance: float | Sequence[float] = 1.0,
    guide: Guide | None = None,
    generator: torch.Generator | None = None,
    max_batch: int | None = None,
    progress: bool | str = True,
    **options: Any,
) -> Drawn:
    """Draw images.

    Args:
        network: what predicts.
        sampler: of its path, or a solver of its process in continuous time.
        shape: of the images, [N, C, ...].
        x_T: standard normal noise of that shape, which is scaled to the process's prior.
        cond: keyword arguments of the model, as in ``fastdiff.sample``. Solvers that choose their
            own steps (ode, adaptive) cut tensors with one row an image even without ``max_batch``,
            since images that are finished leave the batch.
        uncond: the same without the condition, for classifier-free guidance.
        guidance: its scale, as in ``fastdiff.sample``; one number for a solver.
        guide: a classifier.
        generator: source of all noise, None for PyTorch's global one.
        max_batch: most images at a time.
        progress: show a progress bar.
        options: further ones of ``fastdiff.sample``; a solver has none.

    Raises:
        TypeError, ValueError, FloatingPointError: as ``fastdiff.sample``, ``sde.Solver.sample``
            and :meth:`Network.for_sampler` do.
    """
    shape, cond = tuple(shape), dict(cond or {})
    if isinstance(sampler, Sampler):
        if x_T is not None and not options.get("start"):  # else ``sample`` sees to it
            warn_of_image_at_the_beginning(sampler)
        chosen = {} if guide is None else {LABELS: PerImage(guide.labels)}
        images: Any = sample(
            network.for_sampler(sampler, guide), sampler, shape, x_T=x_T, cond=cond | chosen,
            uncond=None if uncond is None else {**uncond, **chosen}, guidance=guidance,
            generator=generator, max_batch=max_batch, progress=progress, **options,
        )  # fmt: skip
        asked = torch.full(shape[:1], sampler.table.rows, dtype=torch.int64, device="cpu")
        return Drawn(images, asked)
    if options:
        raise TypeError(f"a solver has no option {', '.join(map(repr, options))}")
    if not isinstance(guidance, (int, float)):
        raise ValueError(f"a solver takes one number for its guidance, got {guidance!r}")
    check_max_batch(max_batch)
    count = shape[0]
    size, guided = max(max_batch or count, 1), guidance != 1
    if guided and uncond is None:
        raise ValueError(f"guidance {guidance} needs the arguments without the condition, uncond")
    cut = size < count or sampler.steps is None  # images that have arrived leave the batch
    conditions = Conditions(cond, uncond if guided else None, count, joined=guided, cut=cut)
    warn_of_image_at_the_end(network.path)
    if x_T is None:
        own = real_parameter(network.model)
        device = torch.device("cpu") if own is None else own.device
        x = sampler.prior(shape, generator=generator, device=device)
    else:
        x = x_T * sampler.sde.prior_std
    score = network.score(conditions, guidance, guide)
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
    return Drawn(
        torch.cat([part.x for part in parts]), torch.cat([part.evaluations for part in parts])
    )


class _PredictionOnly(nn.Module):
    """A model with a learned variance, without it: the first C of its 2 C channels."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.train(model.training if isinstance(model, nn.Module) else False)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        prediction, _ = predict(self.model, x, t, cond, learned=True)
        return prediction.to(x.dtype)


def _from(score: IndexedScore, first: int) -> IndexedScore:
    """The score of a part of the images that begins with number ``first``."""
    return lambda x, t, index: score(x, t, index + first)
