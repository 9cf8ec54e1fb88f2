"""The sizes of a convolution, by which its measured times are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastdiff.ops.conv2d_algorithms import suits
from fastdiff.ops.conv2d_spec import ConvSpec


@dataclass(frozen=True)
class Sizes:
    """What the time of a convolution depends on.

    Attributes:
        x: sizes [N, C, H, W] of the input, the channels of a skip included.
        spec: the convolution. It is measured without norm and epilogue, which take the same time
            whichever algorithm computes the convolution.
        dtype: of input and weight.
        threads: how many threads compute it.
    """

    x: tuple[int, ...]
    spec: ConvSpec
    dtype: torch.dtype
    threads: int

    @property
    def key(self) -> str:
        """The name of its row in the file."""
        spec = self.spec
        numbers = (*self.x, *spec.weight, *spec.stride, *spec.padding)
        numbers += (int(spec.upsample), int(spec.silu))
        return f"{','.join(map(str, numbers))},{str(self.dtype)[6:]},{self.threads}"

    def among(self, names: Sequence[str]) -> list[str]:
        """The algorithms in ``names`` that suit this convolution."""
        return [name for name in names if name == "plain" or suits(name, self.spec, self.dtype)]
