"""How the tests of conv2d judge what an algorithm computes."""

from __future__ import annotations

import torch
from accuracy import assert_as_accurate
from conv2d_cases import needs
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops.conv2d_algorithms import ALGORITHMS

# Relative L2 error in float32 at most, of those that may exceed twice PyTorch's.
BOUNDS = {"winograd4": 2e-5, "phases4": 2e-5, "strassen": 2e-6, "split_bf16": 2e-5}


def call(algorithm, names, **options):
    """A function of the tensors that returns y."""
    options |= needs(algorithm)

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
    dtype = tensors[0].dtype
    rounds = dtype == torch.bfloat16 and ALGORITHMS[algorithm].packed_dtype == dtype
    if not rounds and (algorithm not in BOUNDS or dtype != torch.float32):
        return assert_as_accurate(run, *tensors)
    with fastdiff.backend("reference"):
        (wanted,) = run(*(value.double() for value in tensors))
        (plain,) = run(*tensors)
    (found,) = run(*tensors)
    assert (found.dtype, found.shape) == (dtype, wanted.shape)
    if rounds:  # PyTorch rounds to bfloat16 what it computes first, and its result once at least
        allowed = 2 * max((plain - wanted).norm(), 2**-9 * wanted.norm())
    else:
        allowed = BOUNDS[algorithm] * wanted.norm()
    assert (found - wanted).norm() <= allowed
    return None


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
