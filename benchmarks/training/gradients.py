"""How far the gradients of a network's weights are from those of float64.

The error of a tensor is the L2 norm of its difference from float64, relative to the norm of the
exact gradient. Some gradients are zero but for rounding, as that of a bias of attention's keys: no
tensor's norm is taken for less than a small share of what it would be if all entries of the
network's gradient were equally large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from benchmarks.training.step import Step
from benchmarks.training.tasks import Batch

Gradients = dict[str, Tensor]

WHOLE = "all weights"  # as one long vector
SMALLEST = 1e-2  # least size of an entry, as a share of the root mean square of all entries
TIMES_EAGER = 2.0  # largest error, as a multiple of eager's in the same dtype
ADDED = 2e-5  # that Winograd's algorithm may add, relative L2 in float32


def gradients(step: Step, batch: Batch) -> Gradients:
    """The gradient of a batch's loss by each of the network's parameters."""
    step.loss(batch).backward()
    parameters = dict(step.module.named_parameters())
    lacking = [name for name, p in parameters.items() if p.grad is None]
    if lacking:
        raise ArithmeticError(f"{len(lacking)} weights have no gradient, as {lacking[0]}")
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.grad = None
    return found


def errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """The error of each tensor and of ``WHOLE``; NaN where a gradient has NaN.

    Raises:
        ArithmeticError: other names or shapes than those of ``exact``.
    """
    if {n: g.shape for n, g in found.items()} != {n: g.shape for n, g in exact.items()}:
        raise ArithmeticError("the gradients have other names or shapes than the exact ones")
    squares = {name: g.double().square().sum().item() for name, g in exact.items()}
    off = {
        name: (found[name].double() - g.double()).square().sum().item() for name, g in exact.items()
    }
    whole = sum(squares.values())
    mean = whole / sum(g.numel() for g in exact.values())
    of = {
        name: math.sqrt(off[name] / max(squares[name], SMALLEST**2 * mean * g.numel()))
        for name, g in exact.items()
    }
    return of | {WHOLE: math.sqrt(sum(off.values()) / whole)}


def check(found: Mapping[str, float], eager: Mapping[str, float]) -> float:
    """The error of ``WHOLE``, when no tensor's error is too large.

    Args:
        found, eager: results of :func:`errors`; eager's are those in the same dtype.

    Raises:
        ArithmeticError: an error above twice eager's there, or above twice eager's of the whole
            gradient where eager's is smaller there by chance, and what Winograd may add.
    """
    for name, error in found.items():
        allowed = TIMES_EAGER * max(eager[name], eager[WHOLE]) + ADDED
        if not error <= allowed:
            raise ArithmeticError(
                f"wrong gradient: {name} is off by {error:.1e} from float64, relative L2, "
                f"at most {allowed:.1e} is taken for rounding"
            )
    return found[WHOLE]
