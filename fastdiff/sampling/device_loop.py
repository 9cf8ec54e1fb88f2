"""One row of a sampling loop, counted on the device, for torch.compile and CUDA graphs.

The row's number is in a tensor that ``advance`` increments, not in its arguments. So one compiled
function, or one captured graph, serves all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff import ops
from fastdiff.common.model import Model
from fastdiff.common.per_model import PerModel, with_own_code
from fastdiff.sampling.loop import State, new_history, span, wanted_output


class Buffers:
    """A ``State`` in the form that ``advance`` needs.

    Each argument of the model that changes from row to row is a table [R * U, ...], in which the U
    distinct values of a row are neighbours. The vector ``places`` has the row's number, and then
    for each argument the index of each image's value in the table. Adding ``strides`` takes all of
    them to the next row. U is rounded up to a power of two, so that other labels seldom need
    another graph.

    Args:
        state: the state, whose tensors are used without copies where possible.

    Attributes:
        history: the history tensor of the sampler, None until :meth:`begin`.
    """

    def __init__(self, state: State) -> None:
        self.x, self.table, self.seed, self.noise = state.x, state.table, state.seed, state.noise
        self.history: Tensor | None = None
        self.cond, self.guided = state.cond, state.guided
        self.output = wanted_output(state)
        self.values: dict[str, Tensor] = {}
        device = state.x.device
        places, strides, self.sizes = [torch.zeros(1, dtype=torch.int64, device="cpu")], [1], [1]
        for name, argument in state.per_row.items():
            values, index = argument.values, argument.index
            rows, distinct = values.shape[:2]
            stride = 1 << max(distinct - 1, 0).bit_length()
            if stride != distinct:
                padding = values.new_zeros(rows, stride - distinct, *values.shape[2:])
                values = torch.cat((values, padding), dim=1)
            self.values[name] = values.flatten(0, 1)
            places.append(torch.arange(distinct, device="cpu") if index is None else index.cpu())
            self.sizes.append(len(places[-1]))
            strides.append(stride)
        self.first = torch.cat(places).to(device)
        self.places = self.first.clone()
        per_place = [
            stride for stride, size in zip(strides, self.sizes, strict=True) for _ in range(size)
        ]
        self.strides = torch.tensor(per_place, device=device)

    def inputs(self) -> list[Tensor]:
        """All tensors that come from the caller, in a fixed order."""
        leaves = pytree.tree_leaves(self.cond)
        own = [self.x, self.table, self.seed, self.first, self.strides, *self.values.values()]
        return [value for value in (*own, *leaves) if isinstance(value, Tensor)]

    def signature(self) -> Hashable:
        """A hashable description; one graph serves all buffers of equal signature."""
        leaves, structure = pytree.tree_flatten(self.cond)
        others = tuple(value for value in leaves if not isinstance(value, Tensor))
        tensors = (self.x, self.table, self.seed, self.noise, self.first, *self.values.values())
        return (
            tuple(map(_kind, (*tensors, *leaves))),
            tuple(self.values),
            tuple(self.sizes),
            self.output,
            str(structure),
            others,
        )

    def copy(self) -> Buffers:
        """A copy in its own memory, which only :meth:`load` and ``advance`` write."""
        made = object.__new__(Buffers)
        made.__dict__.update(self.__dict__)
        for name in ("x", "table", "seed", "noise", "first", "places", "strides"):
            setattr(made, name, _copied(getattr(self, name)))
        made.values = {name: value.clone() for name, value in self.values.items()}
        made.cond = pytree.tree_map(_copied, self.cond)
        return made.begin()

    def begin(self) -> Buffers:
        """Make the history tensor, and return self."""
        self.history = new_history(self.x, self.table)
        return self

    def load(self, other: Buffers) -> None:
        """Copy the inputs of ``other``, of the same signature, and go back to the first row.

        The history is not cleared, because no table reads a slot before it has written it.
        """
        for mine, given in zip(self.inputs(), other.inputs(), strict=True):
            mine.copy_(given)
        self.places.copy_(self.first)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _kind(value: Any) -> Hashable:
    if not isinstance(value, Tensor):
        return None
    return value.dtype, value.device, tuple(value.shape), value.stride()


def advance(model: Model, b: Buffers, keep_output: bool = True) -> Tensor | None:
    """Compute a row in place and move to the next.

    Beside the model's kernels this takes three: select the row's arguments, take the sampler's
    step, and increment the places. Guidance adds one, and so does each further argument.

    Args:
        model: the model.
        b: the buffers, changed in place.
        keep_output: return the model's output, in memory that does not overlap x.

    Returns:
        The model's output, or None without ``keep_output``.
    """
    row, *places = b.places.split(b.sizes)
    arguments = {
        name: torch.index_select(values, 0, place)
        for (name, values), place in zip(b.values.items(), places, strict=True)
    }
    t = arguments.pop("t", None)
    images = torch.cat((b.x, b.x)) if b.guided else b.x
    output = b.output.of(model(images, t, **b.cond, **arguments))
    if torch.compiler.is_compiling():  # memory has no address here, and the compiler separates it
        output = output.clone() if keep_output else output
    else:
        begin, end = span(b.x)
        output = output.clone() if begin <= output.data_ptr() < end else output
    ops.sampler_step(b.x, output, b.history, b.noise, b.table, row, seed=b.seed, out=b.x)
    b.places.add_(b.strides)
    return output if keep_output else None


Compiled = Callable[[Model, Buffers, bool], Tensor | None]


def _compile() -> Compiled:
    return torch.compile(with_own_code(advance), dynamic=False)


compiled = PerModel(_compile)  # for each model, its compiled copy of ``advance``
