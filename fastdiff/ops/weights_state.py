"""A number by which a change of weights is noticed after something was computed from them.

And a way to free the weights' memory then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

torch.library.define("fastdiff::weights_state", "(Tensor[] weights) -> int")
torch.library.define("fastdiff::drop_weights", "(Tensor(a!)[] weights, str message) -> ()")


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


def drop_weights(weights: Sequence[Tensor], message: str) -> None:
    """Free the memory of weights, which keep their sizes. What reads or writes them gets an error.

    ``weights_state`` still tells them from other tensors. New memory can be given to a weight by
    ``weight.data = ...``.

    Args:
        weights: dense tensors on a CPU, each of which fills its storage.
        message: of the RuntimeError that reading and writing raise.

    Raises:
        NotImplementedError: the C++ extension is not built.
        ValueError: a tensor is a part of a larger storage, or not on a CPU.
    """
    torch.ops.fastdiff.drop_weights([weight.detach() for weight in weights], message)


@torch.library.impl("fastdiff::weights_state", "CompositeExplicitAutograd")
def _plain(weights: list[Tensor]) -> int:
    return hash(tuple((id(w), w.data_ptr(), _version(w), _sample(w)) for w in weights))


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def _sample(weight: Tensor) -> bytes:
    if weight.numel() == 0:
        return b""
    values = weight.detach()
    values = values.flatten(2) if values.ndim > 2 else values[(...,) + (None,) * (3 - values.ndim)]
    i = torch.arange(max(values.shape[:2]), device=values.device)
    sample = values[tuple(i % size for size in values.shape)]
    return sample.view(torch.uint8).numpy().tobytes()
