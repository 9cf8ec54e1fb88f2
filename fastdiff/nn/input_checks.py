"""Argument checks of the U-Net; each error names the given and the wanted value."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastdiff.nn.config import UNet2DConfig
from fastdiff.nn.karras_config import KarrasUNetConfig

Config = UNet2DConfig | KarrasUNetConfig

_DIMENSIONS = {
    1: {"length": "L"},
    2: {"height": "H", "width": "W"},
    3: {"frames": "F", "height": "H", "width": "W"},
}


def check_sample(sample: Tensor, config: Config) -> None:
    """ValueError unless ``sample`` has the config's dimensions, which every level can halve.

    It is [N, C, H, W], or [N, C, L], or [N, C, F, H, W] of any F; C is the number of the images'
    channels.
    """
    names, channels = _DIMENSIONS[config.dimensions], config.image_channels
    if sample.ndim != 2 + len(names) or sample.shape[1] != channels:
        raise ValueError(
            f"sample must be [N, {channels}, {', '.join(names.values())}], "
            f"got {tuple(sample.shape)}"
        )
    divisor = 2 ** (len(config.block_out_channels) - 1)
    if any(size < 1 for size in sample.shape[2:]) or any(
        size % divisor for size in sample.shape[-2:][-config.dimensions :]
    ):
        halved = " and ".join(name for name in names if name != "frames")
        raise ValueError(
            f"{len(config.block_out_channels)} levels need {halved} divisible by "
            f"{divisor}, got {' x '.join(map(str, sample.shape[2:]))}"
        )


def with_estimate(sample: Tensor, estimate: Tensor | None, config: UNet2DConfig) -> Tensor:
    """The images [N, C, H, W], and behind them the estimate of a self-conditioned model.

    Raises:
        ValueError: a self-conditioned model without an estimate like the images, or another model
            with one.
    """
    if not config.self_condition:
        if estimate is not None:
            raise ValueError("the model is not self-conditioned: estimate must be None")
        return sample
    if estimate is None or estimate.shape != sample.shape:
        seen = "None" if estimate is None else tuple(estimate.shape)
        raise ValueError(
            "the model is self-conditioned: estimate must be its last estimate of x0, zeros at the "
            f"beginning, of shape {tuple(sample.shape)}, got {seen}"
        )
    return torch.cat([sample, estimate.to(sample.dtype)], dim=1)


def as_timesteps(timestep: Tensor | float, device: torch.device, rows: int | None) -> Tensor:
    """A timestep as a tensor [S] on ``device``.

    Args:
        timestep: a number, or a tensor of no or one dimension.
        device: of the result.
        rows: number of rows of a learned embedding, or None for another embedding.

    Raises:
        ValueError: more than one dimension, or fractions for a learned embedding.
        IndexError: a timestep outside the learned embedding's table (CPU tensors).
    """
    if isinstance(timestep, Tensor):
        if timestep.ndim > 1:
            raise ValueError(f"timestep must have shape [] or [N], got {tuple(timestep.shape)}")
        t = timestep.reshape(-1).to(device)
    else:
        fraction = isinstance(timestep, (float, np.floating))
        dtype = torch.float32 if fraction else torch.int64
        t = torch.full((1,), timestep, dtype=dtype, device=device)
    if rows is not None:
        check_indices(t, rows, "timestep")
    return t


def check_conditioning(
    batch: int,
    timestep: Tensor | float | None,
    class_labels: Tensor | None,
    precomputed: Tensor | None,
    channels: int,
    config: Config,
) -> None:
    """TypeError or ValueError unless the conditioning fits a batch of this size.

    Args:
        batch: N.
        timestep: required without ``precomputed``, and by a model with fourier embeddings.
        class_labels: as :func:`check_class_labels` wants them; None with ``precomputed``.
        precomputed: [N, P] or [1, P], or None.
        channels: P.
        config: of the model.
    """
    if isinstance(timestep, Tensor) and timestep.numel() not in (1, batch):
        raise ValueError(
            f"timestep must have 1 element or {batch}, one an image, got {tuple(timestep.shape)}"
        )
    if precomputed is None:
        if timestep is None:
            raise ValueError("timestep must be given, or precomputed in its place, got None")
        check_class_labels(class_labels, batch, config)
        return
    if not isinstance(precomputed, Tensor):
        raise TypeError(
            "precomputed must be a tensor, the result of precompute(...).at(step), "
            f"got {type(precomputed).__name__}"
        )
    if precomputed.shape not in ((1, channels), (batch, channels)):
        raise ValueError(
            f"precomputed must have shape ({batch}, {channels}) or (1, {channels}), "
            f"got {tuple(precomputed.shape)}"
        )
    if class_labels is not None:
        raise ValueError("class_labels must be None beside precomputed, which includes them")
    if timestep is None and config.time_embedding_type == "fourier":
        raise ValueError(
            "a fourier model divides its output by timestep: give it beside precomputed"
        )


def check_class_labels(labels: Tensor | None, batch: int, config: Config) -> None:
    """ValueError or IndexError unless ``labels`` fit a batch of this size and the model's config.

    An unconditional model takes None; a table of classes int64 [N]; class_embed_type timestep
    numbers [N]; class_embed_type identity embeddings [N, D].
    """
    kind, count = config.class_embed_type, config.num_class_embeds
    if kind is None and count is None:
        if labels is not None:
            raise ValueError(
                f"the model is unconditional: class_labels must be None, "
                f"got shape {tuple(labels.shape)}"
            )
        return
    if labels is None:
        raise ValueError("the model is class-conditional: it needs class_labels, got None")
    shape = (batch, config.embedding_channels) if kind == "identity" else (batch,)
    if labels.shape != shape:
        raise ValueError(f"class_labels must have shape {shape}, got {tuple(labels.shape)}")
    if kind == "identity" and not labels.dtype.is_floating_point:
        raise ValueError(f"class_labels must be embeddings, floating point, got {labels.dtype}")
    if kind is None and count is not None:
        check_indices(labels, count, "class_labels")


def check_indices(value: Tensor, count: int, name: str) -> None:
    """ValueError or IndexError unless ``value`` is int64 or int32 in 0..count-1.

    The values of GPU tensors are not checked, since reading them would wait for the GPU.
    """
    if value.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64, got {value.dtype}")
    if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
        low, high = (int(edge) for edge in value.aminmax())
        if low < 0 or high >= count:
            raise IndexError(f"{name} must lie in 0..{count - 1}, got values from {low} to {high}")
