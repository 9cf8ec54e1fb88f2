"""Noise to train with that is not drawn image by image: offset noise and immiscible noise."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.checks import check_floating, check_shape
from fastdiff.common.errors import require


def offset_noise(
    noise: Tensor, strength: float = 0.1, *, generator: torch.Generator | None = None
) -> Tensor:
    """noise + strength z with one normal value z for each channel of each image.

    With independent values alone, a network learns too late to change the mean of an image, so that
    samples are all of medium brightness (Guttenberg 2023, "Diffusion with offset noise"). A model
    trained with it should be sampled from the same noise.

    Args:
        noise: standard normal values [N, C, ...].
        strength: standard deviation of what is added.
        generator: source of z, on the device of ``noise``.

    Raises:
        TypeError: noise that is not floating point.
        ValueError: noise without channels, or a negative strength.
    """
    check_floating(noise, "noise")
    if noise.ndim < 2 or strength < 0:
        raise ValueError(
            f"wanted noise [N, C, ...] and a strength of at least 0, got {tuple(noise.shape)} and "
            f"{strength}"
        )
    shape = (*noise.shape[:2], *[1] * (noise.ndim - 2))
    z = torch.randn(shape, generator=generator, device=noise.device, dtype=noise.dtype)
    return noise + strength * z


def assign_noise(x0: Tensor, noise: Tensor) -> Tensor:
    """The order of a batch's noise in which images and noise are nearest together, int64 [N].

    Each image gets noise from its own part of the space, so that the paths of images mix less and
    the network has less to average over (Li et al. 2024, "Immiscible diffusion", arXiv:2406.12303).
    Every noise is used once, so the noise of a batch keeps its distribution. The assignment is the
    exact one of least total squared distance.

    Args:
        x0: clean images [N, ...].
        noise: standard normal values like ``x0``.

    Returns:
        ``order``, on the device of x0: train image i with ``noise[order[i]]``, or, if the noise was
        made of seeds, with ``seeds[order[i]]``.

    Raises:
        TypeError, ValueError: noise that is not like x0.
        InputError: scipy is not installed.
    """
    check_floating(x0, "x0")
    check_floating(noise, "noise")
    check_shape(noise, x0, "noise")
    # |x - e|^2 = |x|^2 - 2 x e + |e|^2, and only the product depends on who gets which.
    cost = -(x0.float().flatten(1) @ noise.float().flatten(1).T)
    rows, order = require("scipy.optimize").linear_sum_assignment(cost.cpu().numpy())
    assert (rows == range(len(x0))).all()
    return torch.from_numpy(order).to(x0.device)
