"""Helpers of the losses: the call of the model, the mean over an image, the check of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdiff.common.checks import check_floating, wide_dtype
from fastdiff.common.model import Model, Output


def predict(
    model: Model,
    x_t: Tensor,
    t: Tensor,
    cond: Mapping[str, Any],
    *,
    learned: bool = False,
    narrow: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Call a model; split its output into the prediction and the values of its variance.

    Args:
        model: callable (x_t, t, **cond) -> a tensor, a tuple whose first item is the tensor, or an
            object with a tensor named sample; under autocast it may return another dtype.
        x_t: noised images, [N, C, ...].
        t: the model's times, [N].
        cond: keyword arguments of the model.
        learned: whether the model returns 2 C channels, the second C for the variance.
        narrow: leave an output in the dtype of ``x_t``, for a caller that widens it itself.

    Returns:
        The prediction [N, C, ...], and the variance's values [N, C, ...] or None. Both are float32
        (float64 for float64 images), unless ``narrow``.

    Raises:
        TypeError: the model returns no tensor.
        ValueError: the model returns another shape.
    """
    images, channels, *rest = x_t.shape
    given = f"{'learned' if learned else 'fixed'} variance and images of shape {tuple(x_t.shape)}"
    shape = (images, channels * (2 if learned else 1), *rest)
    output = Output(shape, wide_dtype(x_t.dtype), given)
    out = output.checked(model(x_t, t, **cond))
    if not (narrow and out.dtype == x_t.dtype):
        out = out.to(output.dtype)
    if not learned:
        return out, None
    prediction, values = out.chunk(2, dim=1)
    return prediction, values


def image_mean(x: Tensor) -> Tensor:
    """The mean of each image, [N]: over all dimensions but the first."""
    return x.mean(dim=tuple(range(1, x.ndim)))


def check_x0(x0: Tensor) -> None:
    """TypeError or ValueError unless ``x0`` is floating point, of shape [N, C, ...]."""
    check_floating(x0, "x0")
    if x0.ndim < 2:
        raise ValueError(f"x0 must have shape [N, C, ...], got {tuple(x0.shape)}")
