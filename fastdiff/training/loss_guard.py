"""What a run does with a step whose loss or gradient is not finite, or whose loss is far too high.

Such a step updates nothing: weights, moments and averages stay as they were. By choice it ends the
run, or it is left out and counted. The losses that decide are part of the training state, so that a
resumed run decides as the uninterrupted one does.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdiff.common.errors import TrainingError
from fastdiff.training.training_options import TrainingOptions

WINDOW = 100  # number of losses whose median a loss is compared with
ENOUGH = 20  # number of losses before which none counts as too high
NAMED_IMAGES = 10  # that a message names; losses.jsonl names all


@dataclass(frozen=True)
class Fault:
    """Why a step updated nothing.

    Attributes:
        reason: in words, such as "the loss is nan".
        bound: an image whose loss is not below this number is to blame; infinity for losses that
            are not finite. None if no image's loss can tell.
    """

    reason: str
    bound: float | None = None

    def blames(self, loss: float) -> bool:
        """Whether an image of this loss is to blame."""
        return self.bound is None or not loss < self.bound


class LossGuard:
    """Judges the loss and the gradient of each step.

    The bound of a loss is ``options.spike`` times the median of the last :data:`WINDOW` losses of
    steps that were not left out. There is none before :data:`ENOUGH` such losses, and none for a
    median that is not positive.

    Args:
        options: for ``on_bad_loss``, ``spike`` and ``max_skips``.
        tells: whether to warn of steps that are left out; of several processes one should.

    Attributes:
        skipped: number of steps that were left out.
    """

    def __init__(self, options: TrainingOptions, *, tells: bool = True) -> None:
        self.options, self._tells = options, tells
        self.skipped = 0
        self._in_a_row = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def judge_loss(self, loss: float) -> Fault | None:
        """What is wrong with a step's loss, or None."""
        if not math.isfinite(loss):
            return Fault(f"the loss is {loss}", math.inf)
        if not self.options.spike or len(self._recent) < ENOUGH:
            return None
        median = statistics.median(self._recent)
        bound = self.options.spike * median
        if median <= 0 or loss <= bound:
            return None
        return Fault(f"the loss is {loss:.4g}, {loss / median:.3g} times its median", bound)

    def judge_gradient(self, norm: float) -> Fault | None:
        """What is wrong with the norm of a step's gradient, or None."""
        if math.isfinite(norm):
            return None
        return Fault(f"the norm of the gradient is {norm}")

    def accept(self, loss: float) -> None:
        """Count a step that updates the weights."""
        self._in_a_row = 0
        self._recent.append(loss)

    def refuse(self, step: int, fault: Fault, images: Sequence[str]) -> None:
        """Count a step that updates nothing, with a warning.

        Args:
            step: counted from 1.
            fault: what is wrong with it.
            images: the images to blame, by file or number.

        Raises:
            TrainingError: ``options.on_bad_loss`` is "stop", or the step is the last of
                ``options.max_skips`` in a row.
        """
        shown = ", ".join(images[:NAMED_IMAGES])
        more = f" and {len(images) - NAMED_IMAGES} more" if len(images) > NAMED_IMAGES else ""
        where = f"{fault.reason} at step {step}"
        blamed = f"in image{'s'[: len(images) > 1]} {shown}{more}"
        if self.options.on_bad_loss == "stop":
            raise TrainingError(
                f"{where}; a lower learning rate may help, and on_bad_loss='skip' (--on-bad-loss "
                f"skip) leaves such steps out. It is {blamed}"
            )
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.options.max_skips:
            raise TrainingError(
                f"{where}, and {self._in_a_row} steps in a row were left out: the run does not "
                f"recover. The last is {blamed}; a lower learning rate may help"
            )
        if self._tells:
            warnings.warn(f"fastdiff: {where}, which is left out: {blamed}", stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        """What the next steps are judged by, ready for JSON."""
        return {
            "skipped": self.skipped, "in_a_row": self._in_a_row, "recent": list(self._recent),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state_dict`; {} is that of a run that has made no step.

        Raises:
            ValueError: the state is damaged.
        """
        skipped, in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        recent = state.get("recent", [])
        numbers = isinstance(recent, list) and all(isinstance(x, float) for x in recent)
        if not (type(skipped) is type(in_a_row) is int and 0 <= in_a_row <= skipped and numbers):
            raise ValueError(f"unusable record of earlier losses: {dict(state)!r}")
        self.skipped, self._in_a_row = skipped, in_a_row
        self._recent = deque(recent, maxlen=WINDOW)
