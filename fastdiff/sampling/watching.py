"""Observation of a running sampling loop: callbacks, previews, trajectories, finite checks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.samplers import COLUMNS, Table
from fastdiff.samplers.table import OnDevice

Callback = Callable[[int, float, Tensor], None]  # step, t, images


class Watch:
    """Observes every row of a loop over a slice of the batch, before and after the row.

    Args:
        table: the sampler's table.
        on_device: the table's tensors as the loop uses them, with guidance.
        first_step: number of the loop's first step.
        first_image: number of the slice's first image.
        callback: called with x after every ``every`` steps and after the last.
        preview: called with the current estimate of x0 after these steps.
        every: number of steps between calls.
        trajectory: [S + 1, N, C, ...], to be filled with x at the start and after each step.
        check_finite: raise if the model's output is not finite.
    """

    def __init__(
        self,
        table: Table,
        on_device: OnDevice,
        *,
        first_step: int,
        first_image: int,
        callback: Callback | None,
        preview: Callback | None,
        every: int,
        trajectory: Tensor | None,
        check_finite: bool,
    ) -> None:
        self.steps = table.steps.tolist()
        self.ends = table.ends_step
        self.times = [_number(t) for t in table.timesteps.tolist()]
        begins = [True, *self.ends[:-1]]
        self.starts = [t for t, first in zip(self.times, begins, strict=True) if first]
        self.first_step, self.first_image = first_step, first_image
        self.callback, self.preview = callback, preview
        last = table.num_steps - 1
        self.due = [
            end and ((step + 1) % every == 0 or step == last)
            for end, step in zip(self.ends, self.steps, strict=True)
        ]
        self.trajectory, self.check_finite = trajectory, check_finite
        if preview is not None:
            self.before_row = torch.empty(0, device="cpu")
            self.numbers = on_device.numbers
            self.estimate = _only_x0(on_device.values)

    @property
    def keeps_output(self) -> bool:
        """Whether the model's output is needed."""
        return self.check_finite or self.preview is not None

    def begin(self, x: Tensor) -> None:
        """Record x before the first row."""
        if self.trajectory is not None:
            self.trajectory[0].copy_(x)

    def before(self, row: int, x: Tensor) -> None:
        """Keep x before a row, if a preview after the row needs it."""
        if self.preview is not None and self.due[row]:
            self.before_row = x.clone()

    def after(self, row: int, x: Tensor, output: Tensor | None) -> None:
        """Check the output of a row, record x, and call the callbacks that are due.

        Raises:
            FloatingPointError: with ``check_finite``, the model's output is not finite.
        """
        step, t = self.first_step + self.steps[row], self.starts[self.steps[row]]
        if self.check_finite:
            assert output is not None
            self._check(output, step, self.times[row], x.shape[0])
        if self.trajectory is not None and self.ends[row]:
            self.trajectory[self.steps[row] + 1].copy_(x)
        if not self.due[row]:
            return
        if self.preview is not None:
            assert output is not None
            x0 = ops.sampler_step(
                self.before_row, output, None, None, self.estimate, self.numbers[row]
            )
            self.preview(step, t, x0)
        if self.callback is not None:
            self.callback(step, t, x.clone())

    def _check(self, output: Tensor, step: int, t: float, images: int) -> None:
        wrong = output.isfinite().logical_not_().flatten(1).sum(1).tolist()
        if not any(wrong):
            return
        counts = [
            f"{count} of image {self.first_image + row % images}"
            + ("" if len(wrong) == images else f" with{'out' if row < images else ''} cond")
            for row, count in enumerate(wrong)
            if count
        ]
        more = f" and of {len(counts) - 4} more" if len(counts) > 4 else ""
        raise FloatingPointError(
            f"step {step} (t = {t}): of the model's {output[0].numel()} values an image these are "
            f"not finite: {', '.join(counts[:4])}{more}"
        )


def _only_x0(table: Tensor) -> Tensor:
    """A table whose rows return x0, after guidance and thresholding, instead of the next x."""
    table = table[:, : len(COLUMNS)].clone()
    values = dict.fromkeys(COLUMNS[COLUMNS.index("out_x") :], 0.0) | {"out_x0": 1.0, "slot": -1.0}
    for name, value in values.items():
        table[:, COLUMNS.index(name)] = value
    return table


def _number(t: float) -> float:
    """t as int if it is a whole number."""
    return int(t) if t.is_integer() else t
