"""Whether weights are what they were when something was made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

torch.library.define("fastdiff::weights_state", "(Tensor[] weights) -> int")


def weights_state(weights: Sequence[Tensor]) -> int:
    """A number that changes, but for a chance of 2^-64, with the tensors or their values.

    It is made of which tensors they are, of how many writes PyTorch has counted to each, and of a
    sample of their values that meets every output and every input channel; this for writes that
    are not counted, through ``.data``. A write through ``.data`` to a few elements of some
    channels may go unseen.

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
    found = values[tuple(i % size for size in values.shape)]
    return found.view(torch.uint8).numpy().tobytes()
