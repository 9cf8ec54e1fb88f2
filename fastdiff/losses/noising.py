"""Noise that is given or drawn: how losses put it into images and hold a prediction to it.

Where a loss wants ``noise`` it takes standard normal values like the images, or seeds, int64
[N, 2], a seed and a number for each image. Of seeds the noise is that of ``ops.philox_normal`` at
row 0, which the kernels draw whenever they want it and never store.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.common.checks import check_floating, check_shape, wide_dtype


def noised(x0: Tensor, t: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """x_t = signal_t x_0 + sigma_t noise.

    Args:
        x0: clean images [N, ...], floating point.
        t: int64 [N], where the tables have each image's coefficients.
        noise: like ``x0``, or seeds.
        signal: [T], float32 (float64 for float64 images), on their device.
        sigma: [T], likewise.

    Raises:
        TypeError, ValueError, IndexError: as ``ops.q_sample`` and ``ops.q_sample_from_seed``.
    """
    check_floating(x0, "x0")
    if _are_seeds(noise, x0):
        return ops.q_sample_from_seed(x0, t, noise, _row(noise), signal, sigma)
    return ops.q_sample(x0, t, noise, signal, sigma)


def squared_error(
    prediction: Tensor,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    of_x0: Tensor | None,
    of_noise: Tensor | None,
    weight: Tensor,
) -> Tensor:
    """weight_t mean((prediction - p_t x_0 - q_t noise)^2) of each image, [N].

    Args:
        prediction: of the shape of ``x0``; if it has another dtype both are promoted.
        x0: as for :func:`noised`.
        t: likewise.
        noise: likewise.
        of_x0: p [T], floating point; None is 0.
        of_noise: q [T], likewise.
        weight: [T], floating point.

    Returns:
        float32, or float64 if ``prediction`` or ``x0`` is.

    Raises:
        TypeError, ValueError, IndexError: as ``ops.denoising_loss``.
    """
    check_floating(prediction, "prediction")
    check_shape(prediction, x0, "prediction")
    dtype = torch.promote_types(prediction.dtype, x0.dtype)
    prediction = prediction.to(dtype)
    clean = None if of_x0 is None else x0.to(dtype)
    weight = weight.to(wide_dtype(dtype))
    # Of what the target has nothing no coefficient is used, so that any table will do.
    p, q = (weight if table is None else table.to(weight.dtype) for table in (of_x0, of_noise))
    if of_noise is None:
        return ops.denoising_loss(prediction, clean, None, t, p, q, weight)
    if _are_seeds(noise, x0):
        return ops.denoising_loss_from_seed(prediction, clean, noise, _row(noise), t, p, q, weight)
    return ops.denoising_loss(prediction, clean, noise.to(dtype), t, p, q, weight)


def _are_seeds(noise: Tensor, x0: Tensor) -> bool:
    if noise.is_floating_point():
        return False
    if noise.dtype != torch.int64 or noise.shape != (x0.shape[0], 2):
        raise TypeError(
            f"noise must be {x0.dtype} {tuple(x0.shape)} like x0, or seeds, int64 "
            f"({x0.shape[0]}, 2), got {noise.dtype} {tuple(noise.shape)}"
        )
    return True


def _row(seed: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=seed.device)
