"""A model with its process, objective and data: what a trainer makes of its arguments."""

from __future__ import annotations

from torch import nn

from fastdiff.common.errors import InputError
from fastdiff.common.model import Model, layered
from fastdiff.data.training_images import TrainingImages
from fastdiff.diffusion import Diffusion
from fastdiff.nn import ImageNetwork
from fastdiff.nn.wrappers import unwrapped
from fastdiff.objectives import Forward, Objective
from fastdiff.training.distillation import consistency_training
from fastdiff.training.training_options import TrainingOptions


def make_diffusion(
    model: Model,
    forward: Forward,
    options: TrainingOptions,
    prediction: str = "eps",
    objective: str | Objective | None = None,
    variance: str | None = None,
    levels: int | None = None,
) -> Diffusion:
    """A model with its process and its objective, as :class:`fastdiff.training.Trainer` trains it.

    Args:
        model: see :class:`fastdiff.Diffusion`.
        forward: the forward process, a schedule or an SDE.
        options: for their ``weighting``, ``timestep_sampler`` and ``self_condition``.
        prediction: see :class:`fastdiff.Diffusion`.
        objective: see :class:`fastdiff.Diffusion`.
        variance: see :class:`fastdiff.Diffusion`.
        levels: see :class:`fastdiff.Diffusion`.

    Raises:
        InputError: options that do not fit the process or each other.
    """
    weighting, times = options.weighting, options.timestep_sampler
    if objective == "consistency":  # whose intervals double over the training
        objective = consistency_training(forward, prediction, options.steps)
    return Diffusion(
        model, forward, prediction, objective=objective, variance=variance, levels=levels,
        self_condition=options.self_condition,
        weighting=None if weighting == "none" else weighting,
        timesteps=None if times == "default" else times,
    )  # fmt: skip


def check_fit(
    model: ImageNetwork, data: TrainingImages, options: TrainingOptions, learned: bool
) -> None:
    """InputError unless a model takes the images and classes of the data.

    Args:
        model: the bare network.
        data: the images.
        options: for whether the model has a class for hidden labels, and is self-conditioned.
        learned: whether the model predicts the variance too.
    """
    config, classes = model.config, model.config.num_class_embeds or 0
    null_class = options.null_class
    if config.self_condition != options.self_condition:
        kinds = ["is not self-conditioned", "is self-conditioned"]
        raise InputError(
            f"self_condition is {options.self_condition}, but the model "
            f"{kinds[config.self_condition]}: its config must say the same"
        )
    if model.sample_shape != data.shape:
        takes = model.sample_shape or (
            f"in_channels {config.in_channels} and sample_size {config.sample_size}"
        )
        raise InputError(f"the model takes samples of {takes}, the data has {data.shape}")
    if config.out_channels != data.channels * (2 if learned else 1):
        raise InputError(
            f"the model returns {config.out_channels} channels; for images of {data.channels} and "
            f"a {'learned' if learned else 'fixed'} variance it must return "
            f"{data.channels * (2 if learned else 1)}"
        )
    if null_class and not data.classes:
        raise InputError("label_dropout hides labels, but the data has none")
    if classes != len(data.classes) + null_class:
        more = " and label_dropout needs one more" if null_class else ""
        raise InputError(f"the model has {classes} classes, the data {len(data.classes)}{more}")


def called(model: nn.Module, options: TrainingOptions) -> nn.Module:
    """What is called for a model in training: it gives the same, by fused operations if it can."""
    bare = options.compile and model is unwrapped(model)
    network = layered(model, training=True) if bare else None
    if network is None:
        return model
    from fastdiff.compiler.network import TrainedNetwork  # which others need not import

    return TrainedNetwork(network)
