"""A run of steps on a table: the tensors that they share, and where in its grid a run is."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.common.checks import wide_dtype
from fastdiff.diffusers.kept_tables import version
from fastdiff.diffusers.realisation import Program, Start
from fastdiff.diffusers.step_plan import Plan
from fastdiff.diffusers.unit_vectors import Kept, is_place, replaced
from fastdiff.ops.sampler_step import new_history, sampler_step_for


class Run:
    """A run of steps on a table: what does not change from step to step, and the history."""

    __slots__ = (
        "counts", "dtype", "grid", "history", "initial", "kernel", "last", "numbers", "on_cpu",
        "options", "output_size", "place", "plan", "reference", "size", "table", "watched",
    )  # fmt: skip

    def __init__(
        self, plan: Plan, sample: Tensor, output: Tensor, options: tuple[Any, ...]
    ) -> None:
        self.plan, self.options = plan, options
        self.dtype, self.on_cpu = sample.dtype, sample.is_cpu
        self.size, self.output_size = sample.numel(), output.numel()
        self.table, self.numbers = plan.on(sample.device, wide_dtype(sample.dtype))
        self.kernel = sampler_step_for(sample)
        with torch.inference_mode(False):  # a later step may be outside of it
            self.history = new_history(sample, plan.depth) if plan.held and plan.depth else None
        self.reference: Tensor | None = None  # an earlier sample, as the scheduler would keep it
        self.last: Program | None = None  # the step before, None at the start
        self.place = 0
        self.counts = True
        self.grid: Grid | None = None
        self.initial: dict[str, Any] = {}
        self.watched: tuple[tuple[Tensor, int], ...] = ()

    def fits(self, output: Tensor, sample: Tensor, options: tuple[Any, ...]) -> bool:
        """Whether the tensors and options are those of the run, and its grid is unchanged.

        A microsecond counts here. So numbers of elements stand for shapes, which the kernel checks.
        """
        if (
            sample.dtype is not self.dtype
            or output.dtype is not self.dtype
            or sample.numel() != self.size
            or output.numel() != self.output_size
            or sample.is_cpu is not self.on_cpu
            or options != self.options
            or ((sample.requires_grad or output.requires_grad) and torch.is_grad_enabled())
        ):
            return False
        for tensor, then in self.watched:  # noqa: SIM110 (a generator costs a microsecond)
            if tensor._version != then:
                return False
        return True

    def program(self, time: Any) -> Program | None:
        """The program of the next step, None if the table has none for it."""
        place = self.place
        if self.grid is not None:
            found = self.grid.place(time)
            if found is None:
                return None
            if not self.counts:
                place = found
            elif (
                found != place
                and self.grid.values[found] not in self.grid.values[place : place + 1]
            ):
                return None
        programs = self.plan.programs
        return programs[place] if place < len(programs) else None

    def apply(
        self, program: Program, output: Tensor, sample: Tensor, noise: Tensor | None, own: bool
    ) -> tuple[Tensor, ...]:
        """Compute a step's results; noise of the step's ``own`` may be overwritten."""
        kernel, table, numbers = self.kernel, self.table, self.numbers
        row, alpha, start, _ = program.calls[0]
        if program.single:
            if alpha is not None:
                return (torch.add(sample, output, alpha=alpha),)
            # An element is written where the same element was read: a tensor less.
            out = noise if own and sample.is_contiguous() else None
            if out is None:
                out = torch.empty_like(sample)
            if not program.second_in_history:
                kernel(sample, output, self.history, noise, table, numbers[row], None, out)
                return (out,)
            second = torch.empty_like(sample, dtype=table.dtype)
            kernel(sample, output, second.unsqueeze(0), noise, table, numbers[row], None, out)
            return out, second
        results: list[Tensor | None] = [None, None]  # the next sample, and the second result
        for row, alpha, start, writes_second in program.calls:
            made = results[writes_second]
            source = sample
            if start is not Start.SAMPLE:
                source = self.reference if start is Start.REFERENCE else made  # type: ignore[assignment]
            if alpha is not None:
                results[writes_second] = torch.add(source, output, alpha=alpha)
                continue
            if made is None:
                made = results[writes_second] = torch.empty_like(sample)
            kernel(source, output, self.history, noise, table, numbers[row], None, made)
        if program.refers:
            self.reference = sample.detach() if sample.requires_grad else sample
        if program.has_second and self.plan.second_dtype is not self.dtype:
            assert results[1] is not None
            results[1] = results[1].to(self.plan.second_dtype)
        return tuple([one for one in results if one is not None])

    def is_none(self, name: str) -> bool:
        """Whether an attribute that the run holds is None."""
        held = self.initial if self.last is None else self.last.templates
        return held.get(name) is None

    def attributes(self) -> dict[str, Any]:
        """The attributes that the run holds, as the scheduler would have them."""
        if self.last is None:
            return self.initial
        return {
            name: replaced(value, is_place, functools.partial(self._kept, name))
            for name, value in self.last.templates.items()
        }

    def _kept(self, name: str, place: Kept) -> Tensor:
        """A kept tensor of an attribute."""
        assert self.last is not None
        factors = self.last.kept[place.number]
        if factors[-1]:
            assert self.reference is not None
            return self.reference
        assert self.history is not None
        made = torch.zeros_like(self.history[0])
        for slot in np.flatnonzero(factors):
            made.add_(self.history[slot], alpha=float(factors[slot]))
        return made.to(self.plan.kept_dtypes.get(name, self.dtype))


class Grid:
    """The times of a grid on the host, and where each lies in memory."""

    def __init__(self, times: Tensor, host: Tensor) -> None:
        self.times, self.host = times, host
        self.values: list[Any] = host.tolist()
        self.places = {value: j for j, value in reversed([*enumerate(self.values)])}
        self.begin, self.size = times.data_ptr(), times.element_size()
        self.end = self.begin + self.size * len(self.values) if times.is_contiguous() else 0

    def place(self, time: Any) -> int | None:
        """Where a time is in the grid, without waiting for a device; None if that is not known.

        Pipelines take their times from the grid, so that each lies in its memory.
        """
        if isinstance(time, Tensor):
            if time.dtype is not self.times.dtype or time.numel() != 1:
                return None
            address = time.data_ptr()
            if self.begin <= address < self.end:
                return (address - self.begin) // self.size
            return self.places.get(time.item()) if time.is_cpu else None
        if isinstance(time, int) or (isinstance(time, float) and self.host.is_floating_point()):
            return self.places.get(time)
        return None


class Host:
    """What an attribute's value is on the host: itself, or a tensor's copy, and a key for it."""

    def __init__(self, value: Any) -> None:
        self.original = value
        self.value = value.detach().cpu() if isinstance(value, Tensor) else value
        self.version = version(value) if isinstance(value, Tensor) else None
        self.key = _key(self.value)
        self.grid: Grid | None = None

    def is_of(self, value: Any) -> bool:
        """Whether this is the value's, and it has not changed since."""
        if isinstance(value, Tensor):
            return value is self.original and self.version == version(value) is not None
        if isinstance(value, (list, np.ndarray)):  # which may change in place
            return False
        return value is self.original


def _key(value: Any) -> Any:
    """Something that is equal for equal values of an attribute, hashable if they are plain data."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (list, tuple)):
        return tuple(_key(one) for one in value)
    if isinstance(value, dict):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        return type(value), value
    return [value]
