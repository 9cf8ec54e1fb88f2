"""One row of a sampling loop, counted by the host, and the state that all modes start from.

A row is one model call and one ``ops.sampler_step``. Everything else is made before the loop.
Beside the model a row costs one call of the dispatcher, two with guidance, and one more if the
batch mixes class labels. ``device_loop`` has the same row, counted on the device.
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

Advance = Callable[[int], Tensor | None]  # computes a row in place, may return the model's output


@dataclass(frozen=True, eq=False)
class PerRow:
    """An argument of the model that changes from row to row.

    Attributes:
        values: [R, U, ...], for each row the U distinct values in the batch.
        index: int64 [N], the number of each image's value among the U; None if the values are one
            per image, in order.
    """

    values: Tensor
    index: Tensor | None = None


@dataclass(eq=False)
class State:
    """Everything but the model that a row reads and writes, for one slice of the batch.

    Attributes:
        x: the images [N, C, ...], advanced in place.
        table: the sampler's coefficients [R, len(COLUMNS) + K] with guidance, on x's device.
        numbers: the row numbers, each an int64 tensor of one element.
        seed: int64 [N, 2]; None if noise comes from a generator or is not used.
        noise: like x, contiguous; the loop fills it before a row that uses it. None with seeds.
        per_row: the model's arguments that change from row to row; "t" is its second positional
            argument.
        cond: the model's other keyword arguments.
        guided: whether the model gets 2 N images.
        learned_variance: whether the model returns 2 C channels.
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
    """The output that the model must return for a state."""
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

    A network that is ``fastdiff.common.model.Precomputing`` computes its embeddings of all
    timesteps and labels here, in a few large products, instead of in the loop.

    Args:
        model: the model.
        times: the model's times in each row, [R].
        cond: the model's keyword arguments.
        batch: number of images in a model call.
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
    """A function ``advance(row)`` that calls the model and ``ops.sampler_step``.

    Args:
        model: the model.
        state: the state, whose x is changed in place.
        keep_output: whether the caller reads the output that ``advance`` returns, so that it must
            not share memory with x.
    """
    x, table, noise, seed = state.x, state.table, state.noise, state.seed
    history, numbers = new_history(x, table), state.numbers
    images, halves = x, None
    if state.guided:
        images = torch.cat((x, x))
        halves = images.unflatten(0, (2, x.shape[0]))
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
    wanted, (begin, end) = wanted_output(state), span(x)
    shape, dtype = wanted.shape, wanted.dtype
    sampler_step, index_select = ops.sampler_step_for(x), torch.index_select
    model = ranged("model", model)

    def advance(row: int) -> Tensor:
        if halves is not None:
            halves.copy_(x)
        for values, index, out in gathers:
            index_select(values[row], 0, index, out=out)
        output = model(images, times[row], **arguments[row])
        if type(output) is not Tensor or output.shape != shape or output.dtype is not dtype:
            output = wanted.of(output)
        # An output that is x itself is safe, since the operation reads each element before it
        # writes it. A view of x in another order is not.
        if begin <= output.data_ptr() < end and (keep_output or output is not x):
            output = output.clone()
        sampler_step(x, output, history, noise, table, numbers[row], seed, x)
        return output

    return advance


def new_history(x: Tensor, table: Tensor) -> Tensor | None:
    """The history tensor of ``ops.sampler_step``; None for a table without history."""
    depth = table.shape[1] - len(COLUMNS)
    return ops.new_history(x, depth) if depth else None


def span(x: Tensor) -> tuple[int, int]:
    """The addresses of the memory behind a tensor, from its first byte to one past its last."""
    begin = x.untyped_storage().data_ptr()
    return begin, begin + x.untyped_storage().nbytes()
