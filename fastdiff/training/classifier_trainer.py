"""Train a classifier of noised images (Dhariwal & Nichol 2021, arXiv:2105.05233, appendix H)."""

from __future__ import annotations

import copy
import math
import signal
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff import process
from fastdiff.checkpoints.classifier_checkpoint import (
    Accuracy,
    Architecture,
    Classifier,
    check_fits,
)
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import InputError, TrainingError
from fastdiff.common.seeds import seeded
from fastdiff.data.order import Lookahead, batch_indices, stream_generator
from fastdiff.data.training_images import TrainingImages
from fastdiff.schedules import GaussianPath
from fastdiff.sde import discretize
from fastdiff.training.adamw import AdamW
from fastdiff.training.session import deferred_signals, ema_decay
from fastdiff.training.training_bar import training_bar

LEVELS = 5  # number of noise levels at which accuracy is measured
BATCH = 256  # images in one pass when accuracy is measured


@dataclass(frozen=True)
class ClassifierOptions:
    """Options of a classifier's training.

    Attributes:
        steps: total number of optimizer steps.
        batch_size: images per step.
        lr: learning rate of AdamW at the first step; it falls linearly to 0.
        weight_decay: of AdamW.
        ema: decay of the averaged weights; at step s it is min(ema, (1 + s) / (10 + s)).
        seed: of the initial weights, the images' order, the times and the noise.

    Raises:
        InputError: a value outside its range.
    """

    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    ema: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) >= 2**31:
                raise InputError(f"{name} must be below 2**31, got {getattr(self, name)}")
        for name in ("weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise InputError(f"seed must be below 2**63, got {self.seed}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must lie in [0, 1), got {self.ema}")


class ClassifierTrainer:
    """Trains a classifier on x_t at random times of a diffusion model's forward process.

    Times are sampled uniformly from the timesteps of a schedule; an SDE has the timesteps of
    :func:`fastdiff.sde.discretize`.

    Args:
        checkpoint: the diffusion model that the classifier is to guide.
        data: images and labels.
        architecture: None is the default for the images' size and channels.
        options: of the training; None for the defaults.
        device: where to train.

    Attributes:
        model: the classifier in training.
        ema: the classifier with averaged weights, in eval mode.
        finished_steps: number of steps done.

    Raises:
        InputError: images that have no labels, or do not fit the checkpoint or the architecture.

    Example:
        >>> trainer = ClassifierTrainer(checkpoint, fastdiff.data.digits(), device="cuda")
        >>> trainer.run()
        >>> trained = trainer.classifier(fastdiff.data.digits("test"))
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: TrainingImages,
        architecture: Architecture | None = None,
        options: ClassifierOptions | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.options, self.data = options or ClassifierOptions(), data
        if data.labels is None:
            raise InputError("a classifier needs images with labels")
        shape = architecture or Architecture(data.size, data.channels)
        if (shape.image_size, shape.channels) != (data.size, data.channels):
            raise InputError(
                f"the classifier takes {shape.channels} x {shape.image_size} x {shape.image_size} "
                f"images, the data has {data.channels} x {data.size} x {data.size}"
            )
        with seeded(self.options.seed, torch.get_default_device()):
            network = shape.make(len(data.classes))
        self.model = network.to(device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self._made = Classifier(
            self.ema, checkpoint.forward, shape, data.classes,
            seed=self.options.seed, dataset=data.name,
        )  # fmt: skip
        check_fits(self._made, checkpoint)
        forward, self.device = checkpoint.forward, self.model.device
        if isinstance(forward, GaussianPath):
            self.path: GaussianPath = forward
            timesteps = torch.arange(forward.num_timesteps, device="cpu")
            self.labels = forward.labels_of(timesteps, torch.float32)
        else:
            self.path = path = discretize(forward)
            self.labels = forward.label(path.times).float()
        self.optimizer = AdamW(
            self.model.parameters(), lr=self.options.lr, weight_decay=self.options.weight_decay
        )
        self.finished_steps = 0
        self._lookahead = Lookahead(data, self._order, self.options.steps)

    def _order(self, step: int) -> Tensor:
        return batch_indices(len(self.data), self.options.batch_size, step, self.options.seed)

    def step(self) -> float:
        """Train on the next batch and return its cross-entropy, in nats.

        Raises:
            TrainingError: the cross-entropy is not finite; the model is not changed.
        """
        step, options = self.finished_steps, self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * (1 - step / options.steps)
        generator = stream_generator(options.seed, "classifier", step)
        self._lookahead(step)
        x0, classes = self.data.batch(self._order(step), generator)
        assert classes is not None
        t = torch.randint(len(self.labels), (len(x0),), generator=generator, device="cpu")
        loss = functional.cross_entropy(
            self._logits(self.model, x0, t, generator), classes.to(self.device)
        )
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {step + 1}; a lower learning rate may help"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step(
            averages=[*self.ema.parameters()], average_weight=1 - ema_decay(options.ema, step)
        )
        self.finished_steps += 1
        return value

    def run(self, *, progress: bool = True) -> signal.Signals | None:
        """Train to the last step; SIGINT (Ctrl-C) or SIGTERM ends training after the running step.

        Returns:
            The signal that ended the training, or None after the last step.

        Raises:
            TrainingError: the loss is not finite.
        """
        bar = training_bar(self.options.steps, self.finished_steps, progress)
        with bar as count, deferred_signals() as caught:
            while self.finished_steps < self.options.steps and not caught:
                count(self.step(), {})
        return caught[0] if caught else None

    def classifier(self, held_out: TrainingImages | None = None) -> Classifier:
        """The averaged classifier, not a copy: further training changes it.

        Args:
            held_out: images of the same classes, on which the accuracy is measured at five noise
                levels, from the process's last timestep to its first; None for no measurement.

        Raises:
            InputError: the held-out images have other classes.
        """
        made = replace(self._made, step=self.finished_steps)
        if held_out is None:
            return made
        if held_out.classes != self.data.classes:
            raise InputError(
                f"held-out images must have the classes {self.data.classes}, got {held_out.classes}"
            )
        last = len(self.labels) - 1
        timesteps = [round(last * (1 - i / (LEVELS - 1))) for i in range(LEVELS)]
        return replace(made, accuracy=tuple(self._accuracy(held_out, t) for t in timesteps))

    @torch.no_grad()
    def _accuracy(self, images: TrainingImages, timestep: int) -> Accuracy:
        generator = stream_generator(self.options.seed, "held out", timestep)
        right = 0
        for indices in torch.arange(len(images), device="cpu").split(BATCH):
            x0, classes = images.read(indices)
            assert classes is not None
            t = torch.full((len(x0),), timestep, device="cpu")
            predicted = self._logits(self.ema, x0, t, generator).argmax(1).cpu()
            right += int((predicted == classes).sum())
        alpha, sigma = self.path.alpha_t[timestep].item(), self.path.sigma_t[timestep].item()
        return Accuracy(alpha, sigma, right / len(images))

    def _logits(
        self, model: torch.nn.Module, x0: Tensor, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Logits [N, K] of images x0 noised to timesteps t of the path."""
        noise = torch.randn(x0.shape, generator=generator, device="cpu")
        x_t = process.q_sample(self.path, x0, t, noise)
        logits: Tensor = model(x_t.to(self.device), self.labels[t].to(self.device))
        return logits
