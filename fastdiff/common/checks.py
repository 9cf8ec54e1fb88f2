"""Checks of tensors, whose errors name the given and the wanted value; helpers for coefficients."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coefficients for images of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def beside(value: Tensor, x: Tensor) -> Tensor:
    """A coefficient [N] or [], reshaped to broadcast with images x, in ``wide_dtype``.

    Returns:
        [N, 1, ...] with as many dimensions as x, or [], on the device of x.
    """
    value = value.to(x.device, wide_dtype(x.dtype))
    return value if value.ndim == 0 else value.view(-1, *[1] * (x.ndim - 1))


def check_shape(value: Tensor, x: Tensor, name: str) -> None:
    """ValueError unless ``value`` has the shape of ``x``."""
    if value.shape != x.shape:
        raise ValueError(f"{name} must have shape {tuple(x.shape)}, got {tuple(value.shape)}")


def check_floating(x: Tensor, name: str) -> None:
    """TypeError unless ``x`` is floating point and dense."""
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    _check_dense(x, name)


def check_like(value: Tensor, x: Tensor, name: str, like: str) -> None:
    """ValueError or TypeError unless ``value`` has the shape, dtype and device of ``x``."""
    if value.shape != x.shape:
        raise ValueError(
            f"{name} must have the shape of {like}, {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    check_same_kind(value, x, name, like)


def check_same_kind(value: Tensor, x: Tensor, name: str, like: str) -> None:
    """ValueError or TypeError unless ``value`` is dense, with the dtype and device of ``x``."""
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {like}, {x.dtype}, got {value.dtype}")
    check_device(value, x, name, like)


def check_device(value: Tensor, x: Tensor, name: str, like: str) -> None:
    """ValueError unless ``value`` is on the device of ``x``; TypeError unless it is dense."""
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of {like}, {x.device}, got {value.device}")
    _check_dense(value, name)


def check_no_gradient(*tensors: Tensor | None) -> None:
    """RuntimeError if autograd would record an operation on one of ``tensors``."""
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        raise RuntimeError("this operation has no gradient: call it under torch.no_grad()")


def _check_dense(x: Tensor, name: str) -> None:
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")


def check_timesteps(t: Tensor, x: Tensor, num_timesteps: int) -> None:
    """Raise unless t is int64 [N] for x [N, ...] with values in 0..num_timesteps-1.

    The values of GPU tensors are not checked, since reading them would wait for the GPU.

    Raises:
        TypeError: another dtype, or a sparse tensor.
        ValueError: another shape or device.
        IndexError: a value outside the schedule.
    """
    if t.dtype != torch.int64:
        raise TypeError(f"t must be int64, got {t.dtype}")
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"t must have shape ({x.shape[0] if x.ndim else 1},), one timestep an image, "
            f"got {tuple(t.shape)}"
        )
    check_device(t, x, "t", "x")
    if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in t.aminmax())
        if low < 0 or high >= num_timesteps:
            raise IndexError(
                f"t must lie in 0..{num_timesteps - 1} (the schedule's steps), "
                f"got values from {low} to {high}"
            )


def check_statistics(statistics: Tensor, x: Tensor) -> None:
    """ValueError or TypeError unless ``statistics`` is float32 [N, S, 4, C] for x [N, C, ...]."""
    n, channels = x.shape[:2]
    if statistics.ndim != 4 or (*statistics.shape[::2], statistics.shape[3]) != (n, 4, channels):
        raise ValueError(
            f"statistics must have shape [{n}, S, 4, {channels}], got {tuple(statistics.shape)}"
        )
    if statistics.dtype != torch.float32:
        raise TypeError(f"statistics must be float32, got {statistics.dtype}")
    check_device(statistics, x, "statistics", "x")
