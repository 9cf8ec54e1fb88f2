"""A number by which a change of weights is noticed after something was computed from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

torch.library.define("fastdiff::weights_state", "(Tensor[] weights) -> int")


def weights_state(weights: Sequence[Tensor]) -> int:
    """A hash of the tensors, which differs for other tensors or values except by chance (2^-64).

    It covers the identity of the tensors, the number of writes that PyTorch has counted for each,
    and a sample of their values that includes every output and every input channel. The sample is
    for writes through ``.data``, which PyTorch does not count; such a write to a few elements may
    go unnoticed.

    Args:
        weights: dense floating-point tensors [K, C, ...] on a CPU.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a tensor is not dense, or not on a CPU.
    """
    return torch.ops.fastdiff.weights_state(list(weights))


@torch.library.impl("fastdiff::weights_state", "CompositeExplicitAutograd")
def _plain(weights: list[Tensor]) -> int:
    return hash(tuple((id(w), w.data_ptr(), _version(w), _sample(w)) for w in weights))


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def _sample(weight: Tensor) -> bytes:
    if weight.numel() == 0 or weight.ndim < 2:
        return b""
    values = weight.detach().flatten(2) if weight.ndim > 2 else weight.detach().unsqueeze(2)
    i = torch.arange(max(values.shape[:2]), device=values.device)
    sample = values[tuple(i % size for size in values.shape)]
    return sample.view(torch.uint8).numpy().tobytes()
