"""How the tests of conv2d judge what an algorithm computes."""

from __future__ import annotations

import torch
from accuracy import assert_as_accurate
from torch import Tensor

import fastdiff
from fastdiff import ops

# Relative L2 error in float32 at most, of those that may exceed twice PyTorch's.
BOUNDS = {"winograd4": 2e-5, "phases4": 2e-5, "strassen": 2e-6}


def call(algorithm, names, **options):
    """A function of the tensors that returns y."""

    def run(*tensors: Tensor):
        values = dict(zip(names, tensors, strict=True))
        if "norm" in values:  # of the oracle too, where the other tensors are float64
            values["norm"] = values["norm"].float()
        y, found = ops.conv2d(algorithm=algorithm, **values, **options)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (found is not None) == options.get("statistics", False)
        return [y]

    return run


def judge(algorithm, run, *tensors) -> None:
    """Hold to twice PyTorch's error, or in float32 to the bound, which may be more than that."""
    if algorithm not in BOUNDS or tensors[0].dtype != torch.float32:
        return assert_as_accurate(run, *tensors)
    with fastdiff.backend("reference"):
        (wanted,) = run(*(value.double() for value in tensors))
    (found,) = run(*tensors)
    assert (found.dtype, found.shape) == (torch.float32, wanted.shape)
    assert (found - wanted).norm() <= BOUNDS[algorithm] * wanted.norm()
    return None


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
