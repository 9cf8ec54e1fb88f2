"""The noise of losses, as values or as seeds: adding it to images, and errors of predictions.

A loss takes ``noise`` as standard normal values like the images, or as seeds, int64 [N, 2], a seed
and a number for each image. Seeds stand for the noise of ``ops.philox_normal`` at row 0; kernels
compute it where they need it and never store it.
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
        t: int64 [N], each image's index into ``signal`` and ``sigma``.
        noise: standard normal values like ``x0``, or seeds int64 [N, 2].
        signal: coefficients of x_0 [T], float32 (float64 for float64 images), on ``x0``'s device.
        sigma: coefficients of the noise, of the same shape, dtype and device.

    Raises:
        TypeError, ValueError, IndexError: those of ``ops.q_sample`` and
            ``ops.q_sample_from_seed``.
    """
    check_floating(x0, "x0")
    if _are_seeds(noise, x0):
        return ops.q_sample_from_seed(x0, t, noise, _row(noise), signal, sigma)
    return ops.q_sample(x0, t, noise, signal, sigma)


def values_of(noise: Tensor, x0: Tensor) -> Tensor:
    """Noise like ``x0``, from its seeds if it is given as seeds.

    Raises:
        TypeError, ValueError: noise that is not like ``x0``, or seeds of another shape.
    """
    if _are_seeds(noise, x0):
        return ops.philox_normal(noise, 0, x0.shape, x0.dtype)
    check_shape(noise, x0, "noise")
    return noise


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
        prediction: images of the shape of ``x0``; different dtypes are promoted to a common one.
        x0: clean images [N, ...], floating point.
        t: int64 [N], each image's index into the tables.
        noise: standard normal values like ``x0``, or seeds int64 [N, 2].
        of_x0: p [T], floating point; None for 0.
        of_noise: q [T], floating point; None for 0.
        weight: [T], floating point.

    Returns:
        float32, or float64 if ``prediction`` or ``x0`` is float64.

    Raises:
        TypeError, ValueError, IndexError: those of ``ops.denoising_loss``.
    """
    check_floating(prediction, "prediction")
    check_shape(prediction, x0, "prediction")
    dtype = torch.promote_types(prediction.dtype, x0.dtype)
    prediction = prediction.to(dtype)
    clean = None if of_x0 is None else x0.to(dtype)
    weight = weight.to(wide_dtype(dtype))
    # The kernel does not read the coefficients of an absent x0 or noise, so any table will do.
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
