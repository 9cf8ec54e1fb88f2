"""Convolutions that the tests of conv2d compute."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from fastdiff.ops.conv2d_algorithms import ALGORITHMS, suits
from fastdiff.ops.conv2d_spec import ConvSpec

OPTIONS = ("bias", "norm", "emb", "residual")
TENSORS = ("skip", *OPTIONS)  # in the order of the operator's schema
DTYPES = (torch.float32, torch.bfloat16)
DTYPE_IDS = ("f32", "bf16")


def needs(algorithm):
    """Options without which an algorithm refuses every convolution."""
    after_silu = ConvSpec(1, 1, (3, 3), silu=True)
    bare = suits(algorithm, replace(after_silu, silu=False)) or not suits(algorithm, after_silu)
    return {} if bare else {"silu": True}


def _suited(kernel):
    """Algorithms and dtypes for convolutions of a kernel, whatever their channels."""
    return [
        (name, dtype)
        for name in ALGORITHMS
        for dtype in DTYPES
        if suits(name, ConvSpec(1, 1, kernel, **needs(name)), dtype)
    ]


def _every(pairs):
    """For tests of an algorithm and a dtype."""
    ids = [f"{name}-{DTYPE_IDS[DTYPES.index(dtype)]}" for name, dtype in pairs]
    return pytest.mark.parametrize(("algorithm", "dtype"), pairs, ids=ids)


ANY_OF_3X3 = _suited((3, 3))
OF_3X3 = [name for name, dtype in ANY_OF_3X3 if dtype == torch.float32]
every_3x3, every_1x1 = _every(ANY_OF_3X3), _every(_suited((1, 1)))
AROUND = {"padding": (1, 1, 1, 1), "silu": True, "statistics": True}


class Case(NamedTuple):
    x: tuple[int, int, int, int]  # N, C, H, W
    filters: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # above, below, left, right
    skip: int = 0  # channels
    upsample: bool = False

    def suits(self, algorithm, dtype=None):
        return suits(algorithm, self.spec(**needs(algorithm)), dtype)

    def spec(self, **options):
        return ConvSpec(
            self.filters, self.x[1] + self.skip, self.kernel, **self.settings(), **options
        )

    @property
    def weight(self):
        return self.spec().weight

    def settings(self):
        return {"stride": self.stride, "padding": self.padding, "upsample": self.upsample}

    def out(self):
        return (self.x[0], self.filters, *self.spec().output_size(self.x[2:]))


NO_PADDING = (0, 0, 0, 0)
CASES = {
    "three channels": Case((2, 3, 9, 7), 8),
    "four channels to one": Case((2, 4, 8, 8), 1),
    "one channel to three": Case((1, 1, 6, 5), 3),
    "vector tails": Case((3, 13, 11, 7), 19),
    "many filters": Case((2, 35, 9, 10), 131),
    "17 small images": Case((17, 5, 3, 5), 9),
    "no images": Case((0, 5, 4, 4), 6),
    "one pixel": Case((2, 12, 1, 1), 10),
    "without padding": Case((2, 6, 7, 9), 5, padding=NO_PADDING),
    "wide padding": Case((1, 6, 4, 5), 7, padding=(3, 0, 2, 5)),
    "rows in pieces": Case((1, 3, 3, 411), 9),
    "columns": Case((2, 5, 150, 1), 4),
    "skip": Case((2, 16, 6, 6), 8, skip=8),
    "skip that straddles vectors": Case((2, 13, 5, 6), 9, skip=7),
    "skip beyond the first 32 channels": Case((1, 37, 5, 6), 9, skip=29),
    "x without channels": Case((1, 0, 5, 6), 9, skip=5),
    "skip without channels": Case((2, 5, 5, 6), 9, skip=0),
    "upsampled": Case((2, 9, 5, 4), 6, upsample=True),
    "upsampled with a skip": Case((2, 5, 3, 4), 6, skip=6, upsample=True),
    "upsampled, many tiles": Case((2, 35, 21, 19), 70, upsample=True),
    "upsampled, padded evenly": Case((3, 9, 5, 4), 6, padding=(0, 2, 3, 1), upsample=True),
    "upsampled, not padded": Case((2, 9, 7, 4), 17, padding=NO_PADDING, upsample=True),
    "upsampled, padded oddly": Case((2, 9, 5, 4), 6, padding=(1, 0, 2, 1), upsample=True),
    "upsampled, no images": Case((0, 9, 5, 4), 6, upsample=True),
    "1x1": Case((2, 21, 5, 7), 18, (1, 1), padding=NO_PADDING),
    "1x1 of one pixel": Case((3, 21, 1, 1), 18, (1, 1), padding=NO_PADDING),
    "1x1 of two": Case((2, 10, 5, 7), 18, (1, 1), padding=NO_PADDING, skip=5),
    "1x1, deep": Case((1, 1601, 2, 3), 9, (1, 1), padding=NO_PADDING),
    "1x1, padded": Case((2, 5, 4, 3), 6, (1, 1), padding=(1, 2, 0, 1)),
    "1x1, upsampled": Case((2, 5, 4, 3), 6, (1, 1), padding=NO_PADDING, upsample=True),
    "1x1 of every other pixel": Case((2, 5, 6, 7), 6, (1, 1), (2, 2), NO_PADDING),
    "1x1 of halves": Case((3, 32, 5, 7), 19, (1, 1), padding=NO_PADDING),
    "1x1 of halves, one pixel": Case((1, 64, 1, 1), 70, (1, 1), padding=NO_PADDING),
    "1x1 of halves of two": Case((2, 40, 5, 7), 150, (1, 1), padding=NO_PADDING, skip=24),
    "1x1 of halves, deep": Case((1, 1600, 3, 67), 33, (1, 1), padding=NO_PADDING),
    "1x1 of halves, padded": Case((2, 32, 6, 7), 40, (1, 1), (2, 2), (1, 2, 0, 1)),
    "1x1 of halves, upsampled": Case((2, 32, 6, 7), 9, (1, 1), padding=NO_PADDING, upsample=True),
    "5x5": Case((2, 7, 9, 8), 10, (5, 5), padding=(2, 2, 2, 2)),
    "7x7": Case((1, 3, 12, 11), 10, (7, 7), padding=(3, 3, 3, 3)),
    "1x3": Case((2, 7, 5, 8), 10, (1, 3), padding=(0, 0, 1, 1)),
    "4x2": Case((2, 7, 5, 8), 10, (4, 2), padding=(1, 2, 0, 1)),
    "kernel as large as the image": Case((2, 7, 5, 4), 10, (5, 4), padding=NO_PADDING),
    "stride 2": Case((2, 11, 9, 10), 12, stride=(2, 2)),
    "stride 2, padded below": Case((2, 11, 10, 8), 12, stride=(2, 2), padding=(0, 1, 0, 1)),
    "stride 2, many blocks": Case((1, 4, 41, 59), 5, stride=(2, 2)),
    "stride 3 and 1": Case((2, 6, 11, 7), 5, stride=(3, 1)),
    "stride 2, upsampled": Case((1, 6, 4, 5), 5, stride=(2, 2), upsample=True),
}


def make(case, dtype, options, seed=0):
    """x, weight and the options' tensors."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=g).to(dtype)

    n, channels = case.x[0], case.weight[1]
    fan_in = channels * math.prod(case.kernel)
    values = {
        "x": normal(*case.x),
        "weight": (normal(*case.weight) / math.sqrt(fan_in)).to(dtype),
    }
    if case.skip:
        values["skip"] = normal(n, case.skip, *case.x[2:])
    shapes = {"bias": (case.filters,), "emb": (n, case.filters), "residual": case.out()}
    for name in options:
        if name == "norm":
            values[name] = normal(n, 2, channels).float() + torch.tensor([[1.0], [0.0]])
        else:
            values[name] = normal(*shapes[name])
    return values
