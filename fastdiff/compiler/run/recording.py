"""Record a function's operations from PyTorch's dispatcher, as a list that csrc/replay.cpp runs.

A list depends only on the sizes of the function's inputs. A function cannot be recorded where a
tensor's values decide what it does next, or where it reads a tensor that is not known.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

log = logging.getLogger("fastdiff.compiler")
_FORMATS = (
    torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d,
)  # fmt: skip
_TENSOR = object()  # a placeholder in ``leaves`` for the next result of the list
_aten, _ours = torch.ops.aten, torch.ops.fastdiff

# Returns one input of a list, given the arguments of ``Recording.run``.
Source = Callable[..., Tensor]


class Recording:
    """A recorded list of operations, its inputs, and the structure of its result.

    Args:
        program: the list, a ``Program`` of csrc/replay.cpp.
        sources: one function for each input of the list.
        leaves: the leaves of the function's result, with ``_TENSOR`` for each tensor.
        spec: the structure of the leaves.
    """

    def __init__(
        self, program: Any, sources: Sequence[Source], leaves: Sequence[Any], spec: TreeSpec
    ) -> None:
        self.program, self.sources, self.leaves, self.spec = program, sources, leaves, spec

    def run(self, *given: Any) -> Any:
        """Run the list, and return what the recorded function returns."""
        results = iter(self.program.run([source(*given) for source in self.sources]))
        leaves = [next(results) if leaf is _TENSOR else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)


class Recorder(TorchDispatchMode):
    """Records the operations within its ``with`` block.

    A tensor's place is its index in ``sources``, which holds a ``Source`` for a tensor that exists
    before the block, the tensor itself for a constant, and None for a result of an operation.

    Args:
        names: the tensors that exist before the block, and their sources.
        numbers: the tensors among them that hold the same number whenever the list is run.

    Attributes:
        packs: whether weights were packed in the block. Later calls need not pack them.
    """

    supports_higher_order_operators = True  # they run, but a function with them is not recorded

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: Dynamo is already off here, and skipping it would import it, for seconds."""
        return False

    def __init__(
        self, names: Iterable[tuple[Tensor, Source]], numbers: Sequence[Tensor] = ()
    ) -> None:
        super().__init__()
        self.packs = False
        self.reason: str | None = None  # why there is no list
        self.numbers = WeakIdKeyDictionary(dict.fromkeys(numbers))
        self.places = WeakIdKeyDictionary()
        self.sources: list[Source | Tensor | None] = []
        self.steps: list[tuple[OpOverload, list[Any], list[tuple[int, ...]]]] = []
        for x, source in names:
            if x not in self.places:
                self._place(x, source)

    def _place(self, x: Tensor, source: Source | Tensor | None) -> int:
        self.places[x] = len(self.sources)
        self.sources.append(source)
        return len(self.sources) - 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and record it."""
        result = func(*args, **(kwargs or {}))
        if func is _ours.conv2d_pack.default:
            self.packs = True
        elif func is _ours.weights_state.default:
            pass  # not recorded: ``Replay`` checks the weights before it runs a list
        elif func is _aten._local_scalar_dense.default and args[0] in self.numbers:
            pass
        elif self.reason is None:
            try:
                self._note(func, args, kwargs or {}, result)
            except _NotRecordedError as reason:
                self.reason = f"{func}: {reason}"
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not isinstance(func, OpOverload):
            raise _NotRecordedError("no operation of the dispatcher")
        if _depends_on_values(func, args):
            raise _NotRecordedError("its result decides what comes next")
        if func is _aten.lift_fresh.default and args[0] not in self.places:
            # A tensor that Python made of numbers: they are the same whenever the list is run.
            self._place(args[0], args[0])
        arguments = []
        for i, parameter in enumerate(func._schema.arguments):
            if i < len(args):
                arguments.append(self._argument(args[i], parameter))
            elif parameter.name in kwargs:
                arguments.append(self._argument(kwargs[parameter.name], parameter))
            else:
                arguments.append(("default",))
        count = len(func._schema.returns)
        results = () if count == 0 else (result,) if count == 1 else result
        written = [tuple(self._result(x) for x in _list(each)) for each in results]
        self.steps.append((func, arguments, written))

    def _result(self, x: Any) -> int:
        if not isinstance(x, Tensor):
            raise _NotRecordedError("a result that is no tensor")
        return self._place(x, None)

    def _argument(self, value: Any, parameter: Any) -> tuple[Any, ...]:
        if isinstance(value, Tensor):
            return "register", self._find(value)
        if isinstance(value, (list, tuple)) and "Tensor" in str(parameter.type):
            return "registers", tuple(-1 if x is None else self._find(x) for x in value)
        return "value", _plain(value)

    def _find(self, x: Tensor) -> int:
        place = self.places.get(x)
        if place is None:
            raise _NotRecordedError("a tensor from elsewhere")
        return int(place)

    def finish(self, result: Any) -> Recording | None:
        """The recording of a function that returned ``result``; None if it cannot be recorded."""
        try:
            if self.packs:
                raise _NotRecordedError("packs weights")
            if self.reason is not None:
                raise _NotRecordedError(self.reason)
            leaves, spec = tree_flatten(result)
            outputs = [self._find(x) for x in leaves if isinstance(x, Tensor)]
            program, sources = self._program(outputs)
        # The other errors are raised by ``Program`` for what it does not support.
        except (_NotRecordedError, ValueError, RuntimeError) as reason:
            log.info("runs in Python: %s", reason)
            return None
        leaves = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]
        return Recording(program, sources, leaves, spec)

    def _program(self, outputs: Sequence[int]) -> tuple[Any, list[Source]]:
        last: dict[int, int] = {}  # for each place, the last step that reads or writes it
        for i, (_, given, written) in enumerate(self.steps):
            for place in itertools.chain(*map(_read, given), *written):
                last[place] = i
        used = {*last, *outputs}
        inputs = [i for i, x in enumerate(self.sources) if callable(x) and i in used]
        constants = [i for i, x in enumerate(self.sources) if isinstance(x, Tensor)]
        if constants and any(func._schema.is_mutable for func, _, _ in self.steps):
            raise _NotRecordedError("writes to what may be a constant")
        program = torch.classes.fastdiff.Program(len(inputs))
        numbers = {place: number for number, place in enumerate(inputs)}
        for place in constants:
            numbers[place] = program.constant(self.sources[place])
        freed: dict[int, list[int]] = {}  # for each step, the places that no later step reads
        for place, i in last.items():
            if self.sources[place] is None and place not in outputs:
                freed.setdefault(i, []).append(place)
        for i, (func, given, written) in enumerate(self.steps):
            for place in itertools.chain(*written):
                numbers[place] = len(numbers)
            program.add(
                func._schema.name,
                func._schema.overload_name,
                tuple(_renumbered(argument, numbers) for argument in given),
                tuple(tuple(numbers[place] for place in places) for places in written),
                [numbers[place] for place in freed.get(i, ())],
            )
        program.finish([numbers[place] for place in outputs])
        return program, [self.sources[i] for i in inputs]  # type: ignore[misc]


class _NotRecordedError(Exception):
    """Why a function cannot be recorded."""


def _depends_on_values(func: OpOverload, args: Sequence[Any]) -> bool:
    if func is _aten.index.Tensor:  # depends on the values of masks, but not of integer indices
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags)


def _list(result: Any) -> Sequence[Any]:
    return result if isinstance(result, (list, tuple)) else (result,)


def _read(argument: tuple[Any, ...]) -> Iterator[int]:
    """The places in an argument."""
    if argument[0] == "register":
        yield argument[1]
    elif argument[0] == "registers":
        yield from (place for place in argument[1] if place >= 0)


def _renumbered(argument: tuple[Any, ...], numbers: dict[int, int]) -> tuple[Any, ...]:
    if argument[0] == "register":
        return "register", numbers[argument[1]]
    if argument[0] == "registers":
        return "registers", tuple(numbers.get(place, -1) for place in argument[1])
    return argument


def _plain(value: Any) -> Any:
    """An argument in the form that csrc/replay.cpp takes."""
    if isinstance(value, torch.memory_format):
        return _FORMATS.index(value)
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.layout)):
        return value
    raise _NotRecordedError(f"an argument of type {type(value).__name__}")
