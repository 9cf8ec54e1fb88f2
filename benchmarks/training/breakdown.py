"""The parts of a training step: forward and backward by kind of operation, and what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastdiff
from benchmarks.turns import parts
from benchmarks.unet.breakdown import LAYERS
from benchmarks.unet.breakdown import PARTS as OF_A_CALL

# A weight's half turn is that of the convolution which gives the gradient of the input.
PACKING = {"packing of weights": ("fastdiff::conv2d_pack", "aten::flip")}
# For each part the beginnings of its operations' names; the first part that has one counts.
FORWARD = PACKING | {f"forward, {name}": begins for name, begins in OF_A_CALL.items()}
BACKWARD = PACKING | {
    "backward, weight gradients": ("fastdiff::conv2d_weight_gradient",),
    "backward, data gradients": ("fastdiff::conv2d",),
    "backward, PyTorch's convolutions": ("aten::convolution_backward",),
    "backward, linear layers": OF_A_CALL[LAYERS],
    "backward, norms": (
        *OF_A_CALL["norms"],
        "fastdiff::norm_backward",
        "aten::silu_backward",
    ),
    "backward, attention": OF_A_CALL["attention"],
}
# Phases that are one part each.
OTHERS = {"data": "data", "optimizer": "optimizer", "ema": "running average"}


def measure(step: Callable[[], object], calls: int) -> dict[str, Any]:
    """Milliseconds of each part of a training step, see ``parts.measure``."""
    with fastdiff.profile():  # its trainer's phases
        return parts.measure(step, calls, part_of)


def part_of(name: str, phase: str) -> str | None:
    """The part of an operation by its name, in a phase of ``parts.PHASES``."""
    if phase in OTHERS:
        return OTHERS[phase]
    return parts.by_beginning(BACKWARD if phase == "backward" else FORWARD, name)
