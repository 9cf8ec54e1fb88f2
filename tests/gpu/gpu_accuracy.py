"""How the GPU kernels are judged: against float64, beside plain PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accuracy import assert_no_worse
from torch import Tensor


def assert_close_to_oracle(
    call: Callable[..., Sequence[Tensor]], *arguments: Tensor | None, cancelling: bool = False
) -> None:
    """Hold call(*arguments) on the active kernels to twice the error of PyTorch in the same dtype.

    As ``accuracy.assert_as_accurate`` does for the CPU's.
    """
    assert_no_worse(list(call(*arguments)), call, arguments, cancelling)
