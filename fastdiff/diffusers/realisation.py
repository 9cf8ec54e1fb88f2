"""A scheduler's steps as rows of a sampler's table, with its kept tensors in the table's history.

A row writes one tensor from all its inputs and the history, and keeps one combination of its inputs
alone in a slot (``fastdiff.samplers.table``). What a scheduler keeps between steps is expressed by
slots: a step that keeps r independent new values takes r rows, each of which keeps one. Where a
kept tensor is itself a recursion (UniPC's corrected sample), it would need one more slot in every
step. Then the first row computes it, and the second starts from it and keeps it.

Where diffusers keeps the sample itself, and later results start from it in the new sample's place
(the second steps of Heun and KDPM2), it is not copied to a slot either, but referred to.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusers.unit_vectors import INPUTS, X0, M, StepMap, X, Z
from fastdiff.samplers.table import COLUMNS, MAX_HISTORY

_REFERENCE = INPUTS + MAX_HISTORY  # an earlier sample that is referred to
_WIDTH = _REFERENCE + 1  # coordinates of a combination: the inputs, the slots, and this
_SAME = 1e-9  # relative difference below which combinations are the same
_COLUMN = {name: j for j, name in enumerate(COLUMNS)}
_IDLE = {"guidance": 1.0, "clip_min": -np.inf, "clip_max": np.inf, "slot": -1.0}


class TooManyValuesError(Exception):
    """Steps that keep more independent values than a table's history has slots."""


class NoReferenceError(Exception):
    """Steps that need the sample beside an earlier one, which then has to be in a slot."""


class Start(Enum):
    """What a call takes as its sample."""

    SAMPLE = auto()
    CHAINED = auto()  # the tensor that the call before it has written
    REFERENCE = auto()  # the earlier sample that the run refers to


class Call(NamedTuple):
    """One operation of a step.

    Attributes:
        row: the number of the table's row that it does, -1 for none.
        alpha: if it does no row: the result is what it starts from plus alpha times the model's
            output, for which PyTorch's own addition is as fast as memory.
        start: what it starts from.
        second: it writes the step's second result, not the next sample.
    """

    row: int
    alpha: float | None
    start: Start
    second: bool


@dataclass(frozen=True)
class Program:
    """How a step is computed.

    Attributes:
        calls: its operations; the last writes the next sample.
        single: it has one, which starts from the sample, and the run need not refer to that.
        second_in_history: the only row keeps the step's second result, in slot 0 of a history of
            its own.
        has_second: whether the step returns a second tensor.
        draws: whether it draws noise.
        refers: the run refers to this step's sample from now on.
        kept: the kept tensors after the step, as combinations of the slots, and of the sample that
            is referred to.
        values: attributes of the scheduler that the step sets, but for lists.
        lists: those that are lists.
        templates: attributes that hold kept tensors, see ``unit_vectors.Kept``.
    """

    calls: tuple[Call, ...]
    single: bool
    second_in_history: bool
    has_second: bool
    draws: bool
    refers: bool = False
    kept: tuple[np.ndarray, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, list[Any]] = field(default_factory=dict)
    templates: dict[str, Any] = field(default_factory=dict)


class _Rows:
    """The rows that are made so far, and which combination each kept tensor is."""

    def __init__(self, kept: int, sums: bool) -> None:
        self.sums = sums
        self.depth = kept  # what a scheduler keeps can be read even if no step reads it
        if kept > MAX_HISTORY:
            raise TooManyValuesError(f"{kept} kept tensors at the start")
        self.kept = [_unit(INPUTS + j) for j in range(kept)]
        self.rows: list[dict[str, float]] = []
        self.slots: list[np.ndarray] = []

    def combination(self, vector: np.ndarray) -> np.ndarray:
        """A vector over the step's coordinates as a combination of inputs and slots."""
        made = np.zeros(_WIDTH)
        made[:INPUTS] = vector[:INPUTS]
        for factor, kept in zip(vector[INPUTS:], self.kept, strict=True):
            made += factor * kept
        return made

    def add(
        self, step: StepMap, out: np.ndarray, keep: np.ndarray | None = None, slot: int = -1
    ) -> int:
        """Add a row that writes the combination ``out`` and keeps ``keep`` in a slot."""
        if out[_REFERENCE]:  # which then stands in the sample's place
            keeps_sample = keep is not None and (keep[X] or keep[X0])
            if out[X] or out[X0] or keeps_sample:
                raise NoReferenceError("a row needs the sample beside an earlier one")
            out = out.copy()
            out[X] = out[_REFERENCE]
        row = dict(_IDLE)
        if step.clipping is not None:
            row["x0_x"], row["x0_m"] = step.clipping.x0
            row["quantile"] = step.clipping.quantile
            row["clip_min"], row["clip_max"] = step.clipping.low, step.clipping.high
        row["out_x"], row["out_m"], row["out_x0"], row["noise"] = out[[X, M, X0, Z]]
        if step.variance is not None:
            row["logvar"], row["logvar_v"] = step.variance
        if keep is not None:
            row["keep_x"], row["keep_m"], row["keep_x0"], row["keep_noise"] = keep[[X, M, X0, Z]]
            row["slot"] = slot
        self.rows.append(row)
        self.slots.append(out[INPUTS:_REFERENCE])
        return len(self.rows) - 1

    def sum(self, out: np.ndarray) -> float | None:
        """The alpha with which a combination is what it starts from plus alpha times the output."""
        start = _REFERENCE if out[_REFERENCE] else X
        others = np.delete(out, [start, M])
        return float(out[M]) if self.sums and out[start] == 1 and not others.any() else None

    def table(self) -> Tensor:
        """The rows as a table [R, columns + slots], float64."""
        used = [np.flatnonzero(slots).max(initial=-1) for slots in self.slots]
        depth = max([self.depth - 1, *used, *(int(row["slot"]) for row in self.rows)]) + 1
        values = np.zeros((len(self.rows), len(COLUMNS) + depth))
        for j, (row, slots) in enumerate(zip(self.rows, self.slots, strict=True)):
            for name, value in row.items():
                values[j, _COLUMN[name]] = value
            values[j, len(COLUMNS) :] = slots[:depth]
        return torch.from_numpy(values)


def realise(
    steps: Sequence[StepMap | None], kept: int, second_in_history: bool, sums: bool
) -> tuple[Tensor, list[Program | None]]:
    """The table of a run of steps, and the program of each, None for None.

    Args:
        steps: the steps' maps, each applied to what the one before it keeps.
        kept: the number of tensors kept before the first step, which are in slots 0, 1, ...
        second_in_history: a step's second result has the history's dtype. Then a step that keeps
            nothing takes one row for both of its results.
        sums: the sample and the model's output can be added: they have one shape, and the results
            have their dtype.

    Raises:
        TooManyValuesError: the history would need more slots than it has.
    """
    attempt = partial(_realise, steps, kept, second_in_history, sums)
    if any(step.samples for step in steps if step is not None):
        with contextlib.suppress(NoReferenceError, TooManyValuesError):
            return attempt(_add_step, refers=True)
    try:
        return attempt(_add_step)
    except TooManyValuesError:
        return attempt(_add_recursion)


def _realise(
    steps: Sequence[StepMap | None],
    kept: int,
    second_in_history: bool,
    sums: bool,
    add: Callable[[_Rows, StepMap, bool], tuple[list[Call], bool]],
    refers: bool = False,
) -> tuple[Tensor, list[Program | None]]:
    rows = _Rows(kept, sums)
    programs: list[Program | None] = []
    # otherwise the run's history has slots, and a history of a step's own would not fit the table
    second_in_history &= kept == 0 and not any(step.kept for step in steps if step is not None)
    for step in steps:
        if step is None:
            programs.append(None)
            continue
        if not refers:
            step = replace(step, samples=frozenset())
        calls, fresh = add(rows, step, second_in_history)
        programs.append(
            Program(
                calls=tuple(calls),
                single=len(calls) == 1 and calls[0].start is Start.SAMPLE and not step.samples,
                second_in_history=fresh,
                has_second=len(step.outputs) > 1,
                draws=step.draws,
                refers=bool(step.samples),
                kept=tuple(one[INPUTS:] for one in rows.kept),
                values=dict(step.values),
                templates=dict(step.templates),
            )
        )
    return rows.table(), programs


def _add_step(rows: _Rows, step: StepMap, second_in_history: bool) -> tuple[list[Call], bool]:
    """Add a step's rows: as many as it keeps new values, and one for a second result."""
    outputs = [rows.combination(one) for one in step.outputs]
    before, after = rows.kept, [rows.combination(one) for one in step.kept]
    for name in step.samples:
        after[step.templates[name].number] = _unit(_REFERENCE)
    referring = [one for one in after if one[_REFERENCE]]
    if any(not _close(one, _unit(_REFERENCE)) for one in referring):
        raise NoReferenceError("a kept tensor is made of an earlier sample")
    if step.samples and len(referring) > len(step.samples):
        raise NoReferenceError("two earlier samples are kept")
    new = _independent([one[:INPUTS] for one in after])
    sums = [rows.sum(one) for one in outputs]
    if len(outputs) > 1 and second_in_history and None in sums:
        row = rows.add(step, outputs[0], keep=outputs[1], slot=0)
        return [Call(row, None, Start.SAMPLE, second=False)], True
    count = max(len(new), len(outputs), 1)
    slots = _free_slots(before, after, len(new))
    calls = []
    for place in range(count):
        second = len(outputs) > 1 and place == 0 and count > 1
        start = Start.REFERENCE if outputs[second][_REFERENCE] else Start.SAMPLE
        j = place - (count - len(new))  # the last rows keep something
        if j < 0 and sums[second] is not None:
            calls.append(Call(-1, sums[second], start, second=second))
            continue
        kept = (new[j], slots[j]) if j >= 0 else (None, -1)
        row = rows.add(step, outputs[second], *kept)
        calls.append(Call(row, None, start, second=second))
    rows.kept = [_stored(one, new, slots) for one in after]
    return calls, False


def _add_recursion(rows: _Rows, step: StepMap, second_in_history: bool) -> tuple[list[Call], bool]:
    """Add the rows of a step one of whose kept tensors combines new values and earlier ones."""
    after = [rows.combination(one) for one in step.kept]
    mixed = [one for one in after if one[:INPUTS].any() and one[INPUTS:].any()]
    if not mixed:
        return _add_step(rows, step, second_in_history)
    recursion = mixed[0]
    if len(step.outputs) > 1 or any(not _close(one, recursion) for one in mixed):
        raise TooManyValuesError("more than one kept tensor is a recursion")
    before = rows.kept
    others = [one for one in after if not _close(one, recursion)]
    new = _independent([one[:INPUTS] for one in others])
    slots = _free_slots(before, [*others, *before], len(new) + 1)
    calls = []
    for j in range(max(len(new), 1)):
        kept = (new[j], slots[j]) if new else (None, -1)
        row = rows.add(step, recursion, *kept)
        calls.append(Call(row, None, Start.SAMPLE, second=False))
    # the next sample from the recursion in the sample's place, the output, noise and slots
    stored = [_wide(one) for one in new]
    old = [INPUTS + j for j in _live(before)]
    basis = [recursion, _unit(M), _unit(Z), *stored, *map(_unit, old)]
    places = [X, M, Z, *(INPUTS + slot for slot in slots[:-1]), *old]
    wanted = rows.combination(step.outputs[0])
    factors = _solved(basis, wanted)
    if factors is None:
        raise TooManyValuesError("the next sample does not follow from what the step keeps")
    out = np.zeros(_WIDTH)
    out[places] = factors
    final = StepMap(step.outputs, [], None, step.draws, step.variance)
    row = rows.add(final, out, keep=_unit(X)[:INPUTS], slot=slots[-1])
    calls.append(Call(row, None, Start.CHAINED, second=False))
    rows.kept = [
        _unit(INPUTS + slots[-1]) if _close(one, recursion) else _stored(one, new, slots)
        for one in after
    ]
    return calls, False


def _free_slots(before: Sequence[np.ndarray], after: Sequence[np.ndarray], count: int) -> list[int]:
    """Slots for ``count`` new values. The last may take one that only its own row still reads."""
    free = [j for j in range(MAX_HISTORY) if j not in _live(after)]
    first = [j for j in free if j not in _live(before)]
    if count == 0:
        return []
    chosen = first[: count - 1]
    last = [j for j in free if j not in chosen]
    if len(chosen) < count - 1 or not last:
        raise TooManyValuesError(f"{count} new values, and no slot is free")
    return [*chosen, last[0]]


def _live(combinations: Sequence[np.ndarray]) -> list[int]:
    """The slots that combinations read."""
    slots = (np.flatnonzero(one[INPUTS:_REFERENCE]) for one in combinations)
    return sorted(set(itertools.chain(*slots)))


def _independent(vectors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Those of the vectors that are not combinations of the ones before them."""
    chosen: list[np.ndarray] = []
    for vector in vectors:
        if vector.any() and (not chosen or _solved(chosen, vector) is None):
            chosen.append(vector)
    return chosen


def _solved(basis: Sequence[np.ndarray], wanted: np.ndarray) -> np.ndarray | None:
    """The factors with which the basis gives a vector, None if it does not."""
    scales = np.array([np.linalg.norm(one) for one in basis])
    matrix = np.stack(basis, axis=1) / scales
    factors = np.linalg.lstsq(matrix, wanted, rcond=1e-13)[0]
    size = np.linalg.norm(wanted)
    factors[np.abs(factors) < 1e-14 * size] = 0
    if np.linalg.norm(matrix @ factors - wanted) > _SAME * size:
        return None
    return factors / scales


def _stored(after: np.ndarray, new: Sequence[np.ndarray], slots: Sequence[int]) -> np.ndarray:
    """A kept tensor's combination of slots, once the new values are in theirs."""
    made = after.copy()
    made[:INPUTS] = 0
    if after[:INPUTS].any():
        factors = _solved(new, after[:INPUTS])
        assert factors is not None
        for slot, factor in zip(slots, factors, strict=False):
            made[INPUTS + slot] = factor
    return made


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return float(np.linalg.norm(a - b)) <= _SAME * float(np.linalg.norm(b))


def _unit(coordinate: int) -> np.ndarray:
    made = np.zeros(_WIDTH)
    made[coordinate] = 1
    return made


def _wide(vector: np.ndarray) -> np.ndarray:
    return np.concatenate((vector, np.zeros(_WIDTH - INPUTS)))
