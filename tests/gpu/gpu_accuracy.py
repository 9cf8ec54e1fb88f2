"""How the GPU kernels are judged: against float64, by what their own arithmetic can explain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accuracy import assert_accurate
from torch import Tensor


def assert_close_to_oracle(
    call: Callable[..., Sequence[Tensor]], *arguments: Tensor | None, cancelling: bool = False
) -> None:
    """Hold call(*arguments) on the active kernels to twice what rounding explains.

    The bounds are those of ``accuracy.assert_accurate``, as for the CPU.
    """
    assert_accurate(list(call(*arguments)), call, arguments, cancelling)
