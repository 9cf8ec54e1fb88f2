"""Training targets p_t x_0 + q_t noise and weights of losses, as cached tables [T]."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastdiff.process import check_kind
from fastdiff.schedules import GaussianPath


class Target(NamedTuple):
    """The target p_t x_0 + q_t noise of a prediction kind, as tables [T] on one device.

    Attributes:
        of_x0: p, None if it is 0 for all timesteps.
        of_noise: q, None if it is 0 for all timesteps.
        ones: the weights of the simple loss, all 1.
    """

    of_x0: Tensor | None
    of_noise: Tensor | None
    ones: Tensor


_targets: WeakKeyDictionary[GaussianPath, dict[object, Target]] = WeakKeyDictionary()
# For each tensor of weights a dict: (device, dtype) -> (its version when copied, the copy).
_weights = WeakTensorKeyDictionary()


def target_of(
    schedule: GaussianPath, kind: str, device: torch.device, dtype: torch.dtype
) -> Target:
    """The target of ``kind`` in a dtype on a device, cached as long as the schedule lives.

    Ho et al. 2020, arXiv:2006.11239 (eps); Salimans & Ho 2022, arXiv:2202.00512 (v); Song et al.
    2021, arXiv:2011.13456 (score); Liu et al. 2022, arXiv:2209.03003 (flow).

    Raises:
        ValueError: unknown kind.
    """
    check_kind(kind)
    if torch.compiler.is_compiling():
        return _made(schedule, kind, device, dtype)
    kept = _targets.setdefault(schedule, {})
    key = kind, device, dtype
    if key not in kept:
        with torch.inference_mode(False):  # autograd cannot save tensors of inference mode
            kept[key] = _made(schedule, kind, device, dtype)
    return kept[key]


def weight_on(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A table of weights in a dtype on a device.

    A table on another device is copied once, because a copy makes the host wait, and copied again
    after it has been changed in place.
    """
    if weight.device == device or weight.is_inference() or torch.compiler.is_compiling():
        return weight.to(device, dtype)
    kept = _weights.setdefault(weight, {})
    version, table = kept.get((device, dtype), (None, None))
    if version != weight._version:
        with torch.inference_mode(False):
            table = weight.detach().to(device, dtype)
        kept[device, dtype] = (weight._version, table)
    return table


def _made(schedule: GaussianPath, kind: str, device: torch.device, dtype: torch.dtype) -> Target:
    alpha, sigma = schedule.alpha_t, schedule.sigma_t
    one = torch.ones_like(alpha)
    of_x0, of_noise = {
        "eps": (None, one),
        "x0": (one, None),
        "v": (-sigma, alpha),
        "score": (None, -1 / sigma),
        "flow": (-one, one),
    }[kind]
    return Target(
        None if of_x0 is None else of_x0.to(device, dtype),
        None if of_noise is None else of_noise.to(device, dtype),
        one.to(device, dtype),
    )
