"""The progress bar of training: loss, images a second, waiting for data, memory, and time left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from fastdiff.common.progress import progress_bar
from fastdiff.training.observers import Observer, RunStart, StepRecord

KEPT = 0.98  # share of its weight that a value keeps in a moving average when the next one comes

Count = Callable[[float, Mapping[str, str]], None]


class MovingAverage:
    """A weighted mean in which older values count less and less; one value is its own mean."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """Count a value; one that is not finite is left out, for it would never be forgotten."""
        if math.isfinite(value):
            self._sum = KEPT * self._sum + weight * value
            self._weight = KEPT * self._weight + weight

    @property
    def value(self) -> float:
        """The mean; 0 before the first value."""
        return self._sum / self._weight if self._weight else 0.0


@contextmanager
def training_bar(steps: int, finished: int, shown: bool) -> Iterator[Count]:
    """For a ``with`` block, a progress bar: a function to call with the loss of each step.

    The bar shows a moving average of the losses, and the texts of the function's second argument.
    """
    average = MovingAverage()
    with progress_bar(total=steps, initial=finished, desc="training", shown=shown) as bar:

        def count(loss: float, texts: Mapping[str, str]) -> None:
            average.add(loss)
            bar.set_postfix({"loss": f"{average.value:.4f}", **texts}, refresh=False)
            bar.update()

        yield count


class ProgressBar(Observer):
    """Shows a run on standard error."""

    product = "progress bar"

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._open = ExitStack()
        self._rate, self._waited = MovingAverage(), MovingAverage()

    def begin(self, start: RunStart) -> None:
        """Show the bar at the steps that are done."""
        bar = training_bar(start.steps, start.finished_steps, self._shown)
        self._count = self._open.enter_context(bar)

    def step(self, record: StepRecord) -> None:
        """Count a step."""
        speed = record.speed
        # Weighted by the time, the mean of rates is the number of images in that time.
        self._rate.add(speed["images_per_second"], record.seconds)
        self._waited.add(speed["data_wait_share"], record.seconds)
        memory = speed.get("device_memory_gib", speed["memory_gib"])
        self._count(
            record.values["loss"],
            {
                "images/s": f"{self._rate.value:.3g}",
                "waiting": f"{self._waited.value:.0%}",
                "memory": f"{memory:.2f}GiB",
            },
        )

    def end(self) -> None:
        """Close the bar."""
        self._open.close()
