"""A trained model and all that sampling from it needs, as files hold it or a trainer has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints import forward_process
from fastdiff.common.errors import InputError
from fastdiff.common.inputs import laid_out
from fastdiff.common.model import Model
from fastdiff.common.world import World
from fastdiff.diffusion import Diffusion
from fastdiff.generation import Classifier, Contrast, Guide, Samples, draws_noise
from fastdiff.guidance import Linear, Projected
from fastdiff.nn import ImageNetwork
from fastdiff.nn.wrappers import unwrapped
from fastdiff.objectives import Forward
from fastdiff.samplers import Sampler
from fastdiff.sde import Solver


@dataclass
class Checkpoint:
    """A trained model and all that sampling from it needs.

    Attributes:
        model: the network, float32, in eval mode. It may be compiled, or inside a wrapper such as
            DataParallel; a file then holds the bare network, with its own parameter names.
        forward: the schedule or SDE that the model was trained on.
        prediction: what the model predicts: eps, x0, v, score or flow; in continuous time also
            ncsn or edm.
        classes: names of the classes; empty for an unconditional model.
        step: number of training steps that the model has had.
        seed: of the training.
        dataset: name of the data set.
        null_class: whether the model has an additional last class that stands for "no class". Such
            a model was trained with label dropout and can be guided (Ho & Salimans 2022,
            arXiv:2207.12598).
        objective: what the model was trained for, one of ``fastdiff.objectives.NAMES``; None is
            the default of the forward process.
        variance: of the reverse steps, with a NoiseSchedule; None is the objective's default.
        levels: number of noise levels of the objective ncsn; None for other objectives.
        weights: the name of the model's weights, such as ema-0.999; None if they have none.
        few_steps: steps that a model of consistency, progressive or reflow is meant to be sampled
            in; None for other objectives.
    """

    model: ImageNetwork
    forward: Forward
    prediction: str
    classes: tuple[str, ...] = ()
    step: int = 0
    seed: int = 0
    dataset: str = ""
    null_class: bool = False
    objective: str | None = None
    variance: str | None = None
    levels: int | None = None
    weights: str | None = None
    few_steps: int | None = None

    def diffusion(self) -> Diffusion:
        """The model with its process; InputError if the checkpoint's fields contradict."""
        return Diffusion(
            self.model, self.forward, self.prediction, objective=self.objective,
            variance=self.variance, levels=self.levels, few_steps=self.few_steps,
            self_condition=unwrapped(self.model).config.self_condition,
        )  # fmt: skip

    @property
    def image_size(self) -> int:
        """Height and width of the images; InputError unless the model's config has one number."""
        config = unwrapped(self.model).config
        size = config.sample_size
        if not isinstance(size, int):
            raise InputError(f"the model's sample_size must be one number, got {size}")
        if config.dimensions != 2:
            raise InputError(f"wanted a model of images, got one of dimensions={config.dimensions}")
        return size

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, such as (C, S, S); InputError unless the model's config has all sizes."""
        network = unwrapped(self.model)
        shape: tuple[int, ...] | None = network.sample_shape
        if shape is None:
            raise InputError(
                f"the model's sample_size must give all {network.config.dimensions} sizes of a "
                f"sample, got {network.config.sample_size}"
            )
        return shape

    @property
    def channels(self) -> int:
        """Channels of the images."""
        channels: int = unwrapped(self.model).config.image_channels
        return channels

    def check_labels(self, labels: Sequence[int]) -> None:
        """InputError unless every label is a class of this model."""
        if labels and not self.classes:
            raise InputError("the model is unconditional: it has no classes to ask for")
        wrong = [label for label in labels if not 0 <= label < len(self.classes)]
        if wrong:
            raise InputError(
                f"class {wrong[0]} does not exist: the model has 0..{len(self.classes) - 1}"
            )

    def encode(self, images: Tensor, labels: Sequence[int] | None = None) -> Tensor:
        """The noise on the CPU that leads to images [N, C, S, S]: see ``generation.encode``.

        Raises:
            InputError: labels for a model without classes, or none for a model with classes.
            StuckError: the ODE cannot be solved within its tolerance.
        """
        if bool(self.classes) != (labels is not None):
            raise InputError("a model with classes, and no other, needs a label for each image")
        device = unwrapped(self.model).device
        cond = {} if labels is None else {"class_labels": torch.tensor(labels, device=device)}
        return self.diffusion().encode(images.to(device), cond=cond).cpu()

    def check_weaker(self, other: Checkpoint) -> None:
        """InputError unless the model can be guided away from that of another checkpoint.

        Both must have the same forward process, prediction, variance, image size and classes, and
        both or neither must be self-conditioned.
        """
        pairs: dict[str, list[Any]] = {
            "the process": [forward_process.describe(one.forward) for one in (self, other)],
            "the prediction": [self.prediction, other.prediction],
            "a learned variance": [one.diffusion().objective.learned for one in (self, other)],
            "self-conditioning": [one.diffusion().network.self_condition for one in (self, other)],
            "samples of shape": [self.shape, other.shape],
            "the classes": [self.classes, other.classes],
        }
        for name, (own, others) in pairs.items():
            if own != others:
                raise InputError(f"the weaker model has {name} {others}, the model has {own}")

    def sample(self, sampler: Sampler | Solver, **options: Any) -> Tensor:
        """The images of :meth:`generate`, with the same arguments."""
        return self.generate(sampler, **options).images

    def generate(
        self,
        sampler: Sampler | Solver,
        *,
        labels: Sequence[int] | None = None,
        count: int | None = None,
        guidance: float | Sequence[float] = 1.0,
        classifier: Classifier | None = None,
        classifier_scale: float = 1.0,
        weaker: Model | None = None,
        projection: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        mode: str = "auto",
        memory_format: torch.memory_format = torch.channels_last,
        batch_size: int = 256,
        progress: bool | str = True,
        world: World | None = None,
    ) -> Samples:
        """Generate images in [-1, 1], and count the evaluations of the network for each.

        Args:
            sampler: of this model, from ``diffusion().sampler``.
            labels: class of each image; required for a model with classes, else None.
            count: number of images; None for the number of labels.
            guidance: scale of classifier-free guidance, as in ``fastdiff.sample``; one number for a
                solver.
            classifier: (x, t) -> logits [N, K] of noised images, which guides the images to their
                labels; t is the time as the diffusion network is given it. For a model without
                classes, ``labels`` are classes of the classifier.
            classifier_scale: factor of the gradient of the classifier's log-probabilities.
            weaker: a model that takes the same arguments and predicts the same; ``guidance`` is the
                scale of guidance away from it (arXiv:2406.02507) instead of classifier-free.
            projection: options eta, norm and momentum of adaptive projected guidance, with
                ``guidance`` as its scale (arXiv:2410.02416); None for none.
            noise: standard normal noise [N, C, S, S] to begin with; None for the generator's.
            generator: source of all noise; None for PyTorch's global one.
            mode: of ``fastdiff.sample``; for a solver "auto" or "eager".
            memory_format: of the images in the loop; results agree to rounding.
            batch_size: images in one pass. It changes which noise an image gets after x_T.
            progress: show a progress bar.
            world: processes that share the work: each gives this the same arguments, generates a
                share of the images, and is returned all of them. Up to rounding they are those of
                one process. None for this process alone.

        Returns:
            Images [N, C, S, S] on the CPU, and evaluations int64 [N].

        Raises:
            InputError: labels for a model without classes, no labels for a model with classes, or
                unknown labels; guidance of a model that was trained without label dropout; a
                classifier without labels; a score that is not finite; several processes for a
                sampler that draws noise at its steps, since one generator draws it for all images.
        """
        world = World() if world is None else world
        if world.count > 1 and draws_noise(sampler):
            raise InputError(
                f"{sampler!r} draws noise at its steps, one image after the other, which several "
                "processes cannot share; take a sampler without such noise, or one process"
            )
        if self.classes and labels is None:
            raise InputError("the model is class-conditional: say which classes to generate")
        if classifier is not None and labels is None:
            raise InputError("a classifier guides towards labels: say which classes to generate")
        if self.classes or classifier is None:
            self.check_labels(labels or ())
        count = len(labels or ()) if count is None else count
        if count < 0 or batch_size < 1:
            raise InputError(f"cannot generate {count} images, {batch_size} at a time")
        if labels is not None and len(labels) != count:
            raise InputError(f"{count} images were asked for, with {len(labels)} labels")
        total, (start, stop) = count, world.share(count)
        shape = (total, *self.shape)
        device = unwrapped(self.model).device
        if noise is None:
            noise = torch.randn(shape, generator=generator, device="cpu")
        elif noise.shape != shape:
            raise InputError(f"noise must have shape {shape}, got {tuple(noise.shape)}")
        noise = noise[start:stop]
        count, labels = stop - start, None if labels is None else labels[start:stop]
        shape = (count, *shape[1:])
        cond, uncond, guide = {}, None, None
        if labels is not None:
            wanted = torch.tensor(labels, dtype=torch.int64, device=device)
            if classifier is not None:
                guide = Guide(classifier, wanted, classifier_scale)
            if self.classes:
                cond["class_labels"] = wanted
            if self.null_class:
                uncond = {"class_labels": torch.full_like(wanted, len(self.classes))}
        if guidance != 1 and uncond is None and weaker is None:
            raise InputError(
                f"guidance {guidance} needs a model with classes, trained with label dropout"
            )
        contrast, guidance, uncond = self._contrast(guidance, uncond, weaker, projection)
        try:
            samples = self.diffusion().generate(
                sampler,
                shape,
                x_T=laid_out(noise, device, memory_format),
                cond=cond,
                uncond=uncond,
                guidance=guidance,
                guide=guide,
                contrast=contrast,
                generator=generator,
                mode=mode,
                max_batch=batch_size,
                progress=progress,
            )
        except FloatingPointError as error:  # from a solver that chooses its own steps
            raise InputError(str(error)) from None
        return Samples(
            world.joined(samples.images.contiguous(), total),
            world.joined(samples.evaluations, total),
        )

    draw = generate  # the name in earlier versions

    def _contrast(
        self,
        guidance: float | Sequence[float],
        uncond: dict[str, Any] | None,
        weaker: Model | None,
        projection: Mapping[str, Any] | None,
    ) -> tuple[Contrast | None, float | Sequence[float], dict[str, Any] | None]:
        """The contrast of :meth:`generate`, and what is left of guidance and uncond."""
        if (weaker is None and projection is None) or guidance == 1:
            return None, guidance, uncond
        if not isinstance(guidance, (int, float)):
            raise InputError(f"guidance by contrast has one scale, got {guidance!r}")
        try:
            rule = Linear(guidance) if projection is None else Projected(guidance, **projection)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from None
        return Contrast(rule, weaker), 1.0, uncond if weaker is None else None
