"""Everything that a run of scheduler steps needs: its table, its programs and its dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.common.checks import wide_dtype
from fastdiff.common.per_device import PerDevice
from fastdiff.diffusers.realisation import Program, TooManyValuesError, realise
from fastdiff.diffusers.unit_vectors import (
    Step,
    StepMap,
    count_places,
    holds,
    is_place,
    replaced,
    result_dtypes,
    step_map,
    twin,
)
from fastdiff.samplers.table import COLUMNS


@dataclass(frozen=True)
class Request:
    """What decides a plan, beside the scheduler itself.

    Attributes:
        dtype: of the sample and the model's output.
        channels: one image's, of the sample and of the model's output.
        times: of the grid, each as the step takes it.
        start: where in the grid the first step is, each step then following the one before it; None
            if every time's step is taken from the same state.
        quantile: of dynamic thresholding, None if the scheduler has none.
        learned: the model's output has variance channels that the step uses.
    """

    dtype: torch.dtype
    channels: tuple[int, int]
    times: Sequence[Any]
    start: int | None
    quantile: float | None
    learned: bool


class Plan:
    """A table on the devices that use it, and the program of each step.

    Attributes:
        programs: for each time of the grid that of its step, None for one that the scheduler has to
            take itself. It may end earlier.
        depth: the number of slots in the history.
        held: the attributes that hold kept tensors before or after any step.
        second_dtype: of the second result; None if there is none.
        noise_dtype: of the noise that the steps draw.
        kept_dtypes: of the tensors in an attribute.
    """

    def __init__(
        self,
        table: Tensor,
        programs: list[Program | None],
        held: frozenset[str],
        dtypes: tuple[list[torch.dtype], list[torch.dtype], dict[str, torch.dtype]],
    ) -> None:
        self.table, self.programs, self.held = table, programs, held
        self.depth = table.shape[1] - len(COLUMNS)
        results, noise, self.kept_dtypes = dtypes
        self.second_dtype = results[1] if len(results) > 1 else None
        self.noise_dtype = noise[0] if noise else None
        self._copies: PerDevice[Any, tuple[Tensor, tuple[Tensor, ...]]] = PerDevice()

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The table and its row numbers on a device, the table in float32 or float64."""
        key = (device, dtype)
        if key not in self._copies:
            with torch.inference_mode(False):
                numbers = torch.arange(len(self.table), device=device).unbind()
                self._copies[key] = self.table.to(device, dtype, copy=True), numbers
        return self._copies[key]


def make_plan(probe: Any, step: Step, request: Request) -> Plan | None:
    """The plan of the steps that a scheduler takes next, or None if they are not for a table.

    A step that raises an error here has no program. The scheduler then takes it without a table,
    and it raises its error there.

    Args:
        probe: the scheduler's copy from ``unit_vectors.on_host``.
        step: its step as a function.
        request: the steps that are wanted.
    """
    before = {name: value for name, value in probe.__dict__.items() if holds(value, is_place)}
    start = twin(probe)
    maps = _maps(probe, step, request)
    known = [one for one in maps if one is not None]
    held = frozenset(before).union(*(one.templates for one in known))
    if not known or (held and request.start is None):
        return None
    first = (request.start or 0) + maps.index(known[0])
    dtypes = first_dtypes(twin(start), step, request.times[first], request.dtype, request.channels)
    if dtypes[0][0] != request.dtype:
        return None
    for one in known:  # a sample that is kept in another dtype is a copy
        one.samples = frozenset(n for n in one.samples if dtypes[2].get(n) == request.dtype)
    second = dtypes[0][1] if len(dtypes[0]) > 1 else None
    try:
        table, programs = realise(
            maps,
            count_places(before),
            second_in_history=second == wide_dtype(request.dtype),
            sums=request.channels[0] == request.channels[1] and {*dtypes[0]} == {request.dtype},
        )
    except TooManyValuesError:
        return None
    now = {name: start.__dict__.get(name) for name in held}
    for program in programs:
        if program is not None:
            now.update({n: program.values.pop(n) for n in held if n in program.values})
            now.update(program.templates)
            program.templates.update(now)
            lists = [n for n, value in program.values.items() if isinstance(value, list)]
            program.lists.update({n: program.values.pop(n) for n in lists})
    return Plan(table, [*[None] * (request.start or 0), *programs], held, dtypes)


def _maps(probe: Any, step: Step, request: Request) -> list[StepMap | None]:
    """The maps of the steps, None where a step has none; of a sequence up to the first of those."""
    maps: list[StepMap | None] = []
    sequence = request.start is not None
    for time in request.times[request.start or 0 :]:
        scheduler = probe if sequence else twin(probe)
        try:
            maps.append(step_map(scheduler, step, time, request.quantile, request.learned))
        except Exception:  # the step's own error, or NotLinearError
            if sequence:
                break
            maps.append(None)
    return maps


def first_dtypes(
    probe: Any, step: Step, time: Any, dtype: torch.dtype, channels: tuple[int, int]
) -> tuple[list[torch.dtype], list[torch.dtype], dict[str, torch.dtype]]:
    """``result_dtypes`` of a step before which the scheduler is in the state of ``probe``."""

    def single(_: Any) -> Tensor:
        return torch.zeros(1, channels[0], 1, 1, dtype=dtype, device="cpu")

    for name, value in probe.__dict__.items():
        probe.__dict__[name] = replaced(value, is_place, single)
    return result_dtypes(probe, step, time, dtype, channels)
