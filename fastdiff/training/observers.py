"""What watches a training run: bar, logs, grids and report are objects of one kind, told of events.

``Trainer.run`` tells its observers of each step, grid and checkpoint. An observer only reads: a run
gives the same weights with any of them. In a run of several processes the first alone has some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.training.session import Dispensable


@dataclass(frozen=True)
class RunStart:
    """What a process that begins or continues a run knows at its start.

    Attributes:
        out: the run's folder; None for a run that writes nothing.
        finished_steps: steps done by earlier processes.
        steps: the number of the last step.
        facts: JSON values to show of the run: its options, images, network and device.
    """

    out: Path | None
    finished_steps: int
    steps: int
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class StepRecord:
    """A finished step.

    Attributes:
        step: number of finished steps, this one included.
        values: what training computed: ``loss``, ``lr``, ``gradient_norm`` where it is known, and
            the validation losses of steps that have them. They follow from options and images, so
            a resumed run gives the same.
        images: number of images in the step.
        seconds: how long the step took, by a clock that never jumps.
        waited: the part of ``seconds`` in which the step waited for its images.
        memory: largest resident memory of this process so far, in bytes.
        device_memory: largest memory allocated on the model's device, in bytes; None on a CPU.
        refusal: of a step that updated nothing, as its loss or gradient is not finite or its loss
            is too high: the reason, ``fault``, and the numbers of the ``images`` to blame with
            their ``places``, such as files. Such a step may be the last, not finished. None for
            other steps.
    """

    step: int
    values: Mapping[str, Any]
    images: int
    seconds: float
    waited: float
    memory: int
    device_memory: int | None = None
    refusal: Mapping[str, Any] | None = None

    @property
    def speed(self) -> dict[str, float]:
        """What the machine needed, by name: these values differ from run to run."""
        seconds = max(self.seconds, 1e-9)  # a clock's resolution is no reason to divide by 0
        speed = {
            "images_per_second": self.images / seconds,
            "seconds_per_step": self.seconds,
            "data_wait_share": self.waited / seconds,
            "memory_gib": self.memory / 2**30,
        }
        if self.device_memory is not None:
            speed["device_memory_gib"] = self.device_memory / 2**30
        return speed


class Observer:
    """Is told what happens in a run; a subclass has the methods of the events that it wants.

    Attributes:
        product: what it makes, as the warning names it if that fails.
        foreign: whether it calls another package. All errors of a foreign observer are warnings,
            and after the first it is told nothing more. Of the others, errors of files, of memory
            and of values are warnings, and an error in ``begin`` ends the run.
    """

    product = "observation"
    foreign = False

    def begin(self, start: RunStart) -> None:
        """The run begins or continues; it comes before all other events."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""

    def grid(self, step: int, picture: Any) -> None:
        """A grid of samples was drawn after step ``step``: ``picture`` is a PIL image."""

    def before_checkpoint(self, step: int) -> None:
        """A checkpoint of step ``step`` will be written: what led to it should be on the disk."""

    def checkpoint(self, step: int) -> None:
        """A checkpoint of step ``step`` is on the disk."""

    def end(self) -> None:
        """The run ends, by its last step, a signal or an error; after this there are no events."""


class Observers(Observer):
    """Several observers as one, with what becomes of their errors.

    Args:
        members: are told in this order.
        dispensable: makes errors into warnings; shared with the caller, so that each product is
            warned of once.
    """

    def __init__(self, members: Sequence[Observer], dispensable: Dispensable) -> None:
        self.members = list(members)
        self._dispensable = dispensable

    @property
    def want_grids(self) -> bool:
        """Whether a member looks at sample grids, which take time to draw."""
        return any(type(member).grid is not Observer.grid for member in self.members)

    @contextmanager
    def watching(self, start: RunStart) -> Iterator[None]:
        """For a ``with`` block, begin, and end in any case."""
        begun: list[Observer] = []
        try:
            for member in list(self.members):
                begun.append(member)
                if member.foreign:
                    self._tell(member, "begin", start)
                else:
                    member.begin(start)
            yield
        finally:
            for member in begun:
                self._tell(member, "end")

    def step(self, record: StepRecord) -> None:
        """Tell all members of a step."""
        self._tell_all("step", record)

    def grid(self, step: int, picture: Any) -> None:
        """Tell all members of a grid of samples."""
        self._tell_all("grid", step, picture)

    def before_checkpoint(self, step: int) -> None:
        """Tell all members that a checkpoint will be written."""
        self._tell_all("before_checkpoint", step)

    def checkpoint(self, step: int) -> None:
        """Tell all members of a checkpoint."""
        self._tell_all("checkpoint", step)

    def _tell_all(self, event: str, *args: Any) -> None:
        for member in list(self.members):
            self._tell(member, event, *args)

    def _tell(self, member: Observer, event: str, *args: Any) -> None:
        if member not in self.members:  # a foreign one that has failed
            return
        with self._dispensable(member.product, any_error=member.foreign):
            getattr(member, event)(*args)
            return
        if member.foreign:
            self.members.remove(member)
