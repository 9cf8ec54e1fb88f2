"""The running average of a model's weights, all weights in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.common.checks import check_device, check_floating
from fastdiff.ops import reference
from fastdiff.ops.dispatch import dispatch
from fastdiff.ops.gpu import on_gpu

torch.library.define(
    "fastdiff::ema_update", "(Tensor(a!)[] averages, Tensor[] parameters, Tensor weight) -> ()"
)

_kernel = torch.ops.fastdiff.ema_update.default


def ema_update(
    averages: Sequence[Tensor], parameters: Sequence[Tensor], weight: float | Tensor
) -> None:
    """a += weight (p - a) for each average a and its parameter p, in place.

    With weight = 1 - decay this is the exponential moving average of the weights that images are
    generated with (Ho et al. 2020, arXiv:2006.11239, appendix B). On a GPU it is one launch for any
    number of parameters. It cannot be captured in a CUDA graph before it has run once.

    Args:
        averages: floating point tensors, all on one device; computed in float32 or better.
        parameters: one for each average, of its shape and device; dtypes may differ.
        weight: in 0..1; or a float32 tensor of one element on the averages' device, so that the
            weight can change between replays of a captured CUDA graph.

    Raises:
        TypeError: dtypes are not floating point, or tensors are not dense.
        ValueError: numbers, shapes or devices do not fit, or ``weight`` is outside 0..1.
    """
    if not averages:
        if parameters:
            raise ValueError(f"there are no averages for {len(parameters)} parameters")
        return
    if not isinstance(weight, Tensor):
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must lie in 0..1, got {weight}")
        weight = torch.full((), weight, dtype=torch.float32, device=averages[0].device)
    with torch.no_grad():
        dispatch(averages[0], _kernel, reference.ema_update, _check, averages, parameters, weight)


def _check(averages: Sequence[Tensor], parameters: Sequence[Tensor], weight: Tensor) -> None:
    if len(averages) != len(parameters):
        raise ValueError(
            f"there must be as many averages as parameters, got {len(averages)} and "
            f"{len(parameters)}"
        )
    if weight.dtype != torch.float32 or weight.numel() != 1:
        raise TypeError(
            f"weight must be a float32 tensor of one element, got {weight.dtype} "
            f"{tuple(weight.shape)}"
        )
    for index, (a, p) in enumerate(zip(averages, parameters, strict=True)):
        check_floating(a, f"averages[{index}]")
        check_floating(p, f"parameters[{index}]")
        if a.shape != p.shape:
            raise ValueError(
                f"averages[{index}] must have the shape of its parameter, {tuple(p.shape)}, "
                f"got {tuple(a.shape)}"
            )
        check_device(a, averages[0], f"averages[{index}]", "averages[0]")
        check_device(p, averages[0], f"parameters[{index}]", "averages[0]")
    if averages:
        check_device(weight, averages[0], "weight", "averages[0]")


on_gpu("ema_update", _check, traced=False)


@torch.library.register_fake("fastdiff::ema_update")
def _fake(averages: Sequence[Tensor], parameters: Sequence[Tensor], weight: Tensor) -> None:
    _check(averages, parameters, weight)
