"""Rounding in adaptive solvers: default tolerances for a dtype, and a warning if rounding rules.

A network in single precision is accurate to about seven digits. With a smaller tolerance, an
adaptive solver shrinks its steps until the network's rounding times the step is below it, and takes
thousands of steps that only follow rounding.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

MAX_EVALUATIONS = 10_000  # default limit of adaptive solvers; usual solves take tens to hundreds
CHECK_AFTER_EVALUATIONS = 1200  # of one image, before the first check of its rounding
LIMITING_ERROR = 0.1  # error over tolerance from which on the error limits the step size
ROUNDING_SHARE = 0.25  # share of rounding in an estimated error from which on to warn
# Defaults that rounding allows: about the unit of rounding in the narrow dtypes, hundreds of units
# in float32, and far more in float64, where the cost of small steps is the limit.
TOLERANCES = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}


def tolerance_for(x: Tensor, *others: torch.dtype) -> float:
    """The default tolerance for the coarsest dtype of a computation.

    Args:
        x: input of the computation, floating point; autocast on its device counts as well.
        others: further dtypes of the computation, such as the dtype of a network's weights.
    """
    dtypes = [x.dtype, *others]
    if torch.is_autocast_enabled(x.device.type):
        dtypes.append(torch.get_autocast_dtype(x.device.type))
    return max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in dtypes)


def rounded_differently(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with every value moved up or down by one unit of ``dtype``, as if rounded differently."""
    signs = torch.randint(
        2, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8, device="cpu"
    )
    unit = torch.finfo(dtype).eps
    return x * (1 + unit * (2 * signs.to(x.device, x.dtype) - 1))


class RoundingWatch:
    """Warns once if rounding keeps the steps of a solver short.

    A step is repeated from images that are rounded differently. Truncation errors hardly change
    then; errors that consist of rounding change completely.

    Args:
        dtype: dtype of the images that the network gets.
        setting: description of the tolerances, for the message.
    """

    def __init__(self, dtype: torch.dtype, setting: str) -> None:
        self.dtype, self.setting = dtype, setting
        self._next: float = CHECK_AFTER_EVALUATIONS

    def is_due(self, evaluations: Tensor) -> bool:
        """Whether to check now, given the evaluations for each image so far, [M].

        A check is due when an image has had ``CHECK_AFTER_EVALUATIONS``, and at each doubling.
        """
        if int(evaluations.max()) < self._next:
            return False
        self._next *= 2
        return True

    def compare(self, error: Tensor, change: Tensor, index: Tensor, t: Tensor, h: Tensor) -> None:
        """Warn if an error that limits the step size consists of rounding to a large share.

        Args:
            error: error of each step over its tolerance, [M].
            change: change of that error when the step was repeated, over its tolerance, [M].
            index: number of each image in its batch, [M].
            t: time at the start of each step, [M].
            h: size of each step, [M].
        """
        noisy = (error >= LIMITING_ERROR) & (change >= ROUNDING_SHARE * error)
        if not bool(noisy.any()):
            return
        self._next = math.inf  # warn once only
        row = int(noisy.nonzero()[0])
        share = min((change[row] / error[row]).item(), 1.0)
        warnings.warn(
            f"fastdiff: rounding in {self.dtype} makes {share:.0%} of the error that keeps the "
            f"steps of sample {int(index[row])} short at t = {t[row].item():g} (step "
            f"{h[row].item():.3g}, {self.setting}): smaller tolerances than that cost evaluations "
            "and gain nothing; take larger ones, or a network and images in a wider dtype, or "
            "eval() if the network has dropout or other random layers",
            stacklevel=2,
        )
