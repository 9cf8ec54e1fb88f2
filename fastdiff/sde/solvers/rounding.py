"""Tolerances and the rounding of what is solved: defaults for a dtype, and how to tell them apart.

A network in single precision answers to about seven digits. A tolerance that asks for more makes an
adaptive solver shrink its steps until the network's rounding, times the step, fits into it: steps
by the thousand that follow noise.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

MAX_EVALUATIONS = 10_000  # of adaptive solvers; usual solves take tens to hundreds
PATIENCE = 1200  # evaluations for one image, before its rounding is looked at
DECISIVE = 0.1  # error over tolerance from which on a step is about as long as it may be
CHANGED = 0.25  # share of an estimated error beyond which its change is told of
# What rounding leaves room for: its unit in the narrowest dtypes, hundreds of it in float32, and
# more in float64, where time is what limits the tolerance.
TOLERANCES = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}


def tolerance_for(x: Tensor, *others: torch.dtype) -> float:
    """The tolerance that suits the coarsest dtype of a computation.

    Args:
        x: what the computation is given, floating point; autocast on its device counts, too.
        others: further dtypes of it, such as that of a network's weights.
    """
    dtypes = [x.dtype, *others]
    if torch.is_autocast_enabled(x.device.type):
        dtypes.append(torch.get_autocast_dtype(x.device.type))
    return max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in dtypes)


def rounded_otherwise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with every value moved by one unit of ``dtype``, up or down: as good a rounding of it."""
    signs = torch.randint(
        2, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8, device="cpu"
    )
    unit = torch.finfo(dtype).eps
    return x * (1 + unit * (2 * signs.to(x.device, x.dtype) - 1))


class RoundingWatch:
    """Warns once if steps are kept short for the sake of rounding.

    Truncation errors hardly change when a step is tried again from images that are rounded
    otherwise; errors that consist of rounding are then others altogether.

    Args:
        dtype: that of the images that are handed to the network.
        setting: the tolerances, for the message.
    """

    def __init__(self, dtype: torch.dtype, setting: str) -> None:
        self.dtype, self.setting = dtype, setting
        self._next: float = PATIENCE

    def is_due(self, evaluations: Tensor) -> bool:
        """Whether a check is worth its own evaluations, after so many for each image, [M].

        It is after ``PATIENCE`` evaluations for one image, and whenever they have doubled.
        """
        if int(evaluations.max()) < self._next:
            return False
        self._next *= 2
        return True

    def compare(self, error: Tensor, change: Tensor, index: Tensor, t: Tensor, h: Tensor) -> None:
        """Warn if a step's error decides about the next one's size, and is mostly rounding.

        Args:
            error: of each step over its tolerance, [M].
            change: of the estimated errors when tried again, likewise, [M].
            index: number of each image in its batch, [M].
            t: times, [M].
            h: sizes of the steps, [M].
        """
        noisy = (error >= DECISIVE) & (change >= CHANGED * error)
        if not bool(noisy.any()):
            return
        self._next = math.inf  # once is enough
        row = int(noisy.nonzero()[0])
        share = min((change[row] / error[row]).item(), 1.0)
        warnings.warn(
            f"fastdiff: rounding in {self.dtype} makes {share:.0%} of the error that keeps the "
            f"steps of sample {int(index[row])} short at t = {t[row].item():g} (step "
            f"{h[row].item():.3g}, {self.setting}): smaller tolerances than that cost evaluations "
            "and gain nothing; take larger ones, or a network and images in a wider dtype, or "
            "eval() if the network draws random numbers",
            stacklevel=2,
        )
