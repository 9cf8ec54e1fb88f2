"""One row of a sampling loop, the row counted by the host: what every mode starts from.

A row is one model call and one ``ops.sampler_step``. Everything else is made before the loop, so
that a step costs the dispatcher one call beside the model's, two with guidance, and one more where
the batch mixes class labels. ``device_loop`` has the same row, counted on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.common.conditions import Arguments
from fastdiff.common.model import Model, Output, precomputing
from fastdiff.ops.profiling import ranged
from fastdiff.samplers import COLUMNS

Advance = Callable[[int], Tensor | None]  # computes a row in place, returns the model's output


@dataclass(frozen=True, eq=False)
class PerRow:
    """An argument of the model that changes from row to row.

    Attributes:
        values: [R, U, ...], for each row what is distinct in the batch.
        index: int64 [N], which of the U an image takes; None where they serve as they are.
    """

    values: Tensor
    index: Tensor | None = None


@dataclass(eq=False)
class State:
    """All that a row reads and writes but the model, for the images of one pass.

    Attributes:
        x: the images [N, C, ...], advanced in place.
        table: the sampler's coefficients [R, 18 + K], guidance set, on x's device.
        numbers: those of its rows, each an int64 tensor of one element.
        seed: int64 [N, 2], or None where noise is drawn into ``noise`` or not wanted.
        noise: like x, contiguous; filled from outside before a row that uses it.
        per_row: the model's arguments that change; "t" is its second positional one.
        cond: its other keyword arguments.
        guided: it is given 2 N images.
        learned_variance: it returns 2 C channels.
    """

    x: Tensor
    table: Tensor
    numbers: Sequence[Tensor]
    seed: Tensor | None
    noise: Tensor | None
    per_row: dict[str, PerRow]
    cond: Arguments
    guided: bool
    learned_variance: bool


def wanted_output(state: State) -> Output:
    """What the model must return for a state: one prediction for each image that it is given."""
    images, channels, *rest = state.x.shape
    kind = "learned" if state.learned_variance else "fixed"
    shape = (
        images * (2 if state.guided else 1),
        channels * (2 if state.learned_variance else 1),
        *rest,
    )
    given = f"{kind} variance and images of shape {tuple(state.x.shape)}"
    return Output(shape, state.x.dtype, given + (" under guidance" if state.guided else ""))


def model_arguments(
    model: Model, times: Tensor, cond: Arguments, batch: int
) -> tuple[dict[str, PerRow], Arguments]:
    """``State.per_row`` and ``State.cond`` for a model.

    A network that allows it (``fastdiff.common.model.Precomputing``) computes here, in a few large
    products, what its blocks take from all the timesteps and labels, and none of it in the loop.

    Args:
        model: the model.
        times: what it is given as its time in each row, [R].
        cond: its keyword arguments.
        batch: how many images it is given at once.
    """
    index = torch.zeros(batch, dtype=torch.int64, device=times.device)
    t = {"t": PerRow(times.unsqueeze(1), index)}
    network = precomputing(model) if set(cond) <= {"class_labels"} else None
    if network is None:
        return t, cond
    precomputed = network.precompute(times, cond.get("class_labels"), batch)
    per_row = {"precomputed": PerRow(precomputed.rows, precomputed.index)}
    if precomputed.needs_time:
        per_row |= t
    return per_row, {}


def eager(model: Model, state: State, *, keep_output: bool = False) -> Advance:
    """advance(row) by plain calls.

    Args:
        model: the model.
        state: of which x is advanced.
        keep_output: what advance returns is looked at, so it must not share memory with x.
    """
    x, table, noise, seed = state.x, state.table, state.noise, state.seed
    history, numbers = new_history(x, table), state.numbers
    given, halves = x, None
    if state.guided:
        given = torch.cat((x, x))
        halves = given.unflatten(0, (2, x.shape[0]))
    views: dict[str, Sequence[Tensor]] = {}
    gathered: dict[str, Tensor] = {}
    gathers: list[tuple[Sequence[Tensor], Tensor, Tensor]] = []
    for name, argument in state.per_row.items():
        values, index = argument.values, argument.index
        if index is not None and values.shape[1] > 1:
            gathered[name] = values.new_empty(len(index), *values.shape[2:])
            gathers += [(values.unbind(), index, gathered[name])]
        else:
            batch = values.shape[1] if index is None else len(index)
            views[name] = values.expand(-1, batch, *values.shape[2:]).unbind()
    times: Sequence[Tensor | None] = views.pop("t", (None,) * len(table))
    fixed = state.cond | gathered
    arguments = [fixed] * len(table)
    if views:
        names, of_rows = list(views), zip(*views.values(), strict=True)
        arguments = [fixed | dict(zip(names, of_row, strict=True)) for of_row in of_rows]
    output, (begin, end) = wanted_output(state), span(x)
    shape, dtype = output.shape, output.dtype
    sampler_step, index_select = ops.sampler_step_for(x), torch.index_select
    model = ranged("model", model)

    def advance(row: int) -> Tensor:
        if halves is not None:
            halves.copy_(x)
        for values, index, out in gathers:
            index_select(values[row], 0, index, out=out)
        found = model(given, times[row], **arguments[row])
        if type(found) is not Tensor or found.shape != shape or found.dtype is not dtype:
            found = output.of(found)
        # Of x itself the operation reads each element before it writes it; of a view it may not.
        if begin <= found.data_ptr() < end and (keep_output or found is not x):
            found = found.clone()
        sampler_step(x, found, history, noise, table, numbers[row], seed, x)
        return found

    return advance


def new_history(x: Tensor, table: Tensor) -> Tensor | None:
    """What ``ops.sampler_step`` keeps between rows; None for a table that keeps nothing."""
    depth = table.shape[1] - len(COLUMNS)
    return ops.new_history(x, depth) if depth else None


def span(x: Tensor) -> tuple[int, int]:
    """The addresses of the memory behind a tensor, from its first byte to one past its last."""
    begin = x.untyped_storage().data_ptr()
    return begin, begin + x.untyped_storage().nbytes()
