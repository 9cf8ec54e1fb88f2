"""A fused graph that runs without Python between its operations, from the third call of a size on.

Between two operations Python takes longer than expected: after a large convolution its own data
are no longer in the cache. So the operations of the graph for inputs of one size are recorded
(``recording``), and from then on C++ runs them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastdiff.compiler.run.packing import PackedWeight, Watch
from fastdiff.compiler.run.recording import Recorder, Recording, Source
from fastdiff.ops.backend import current, isa

MOST_RECORDINGS = 64  # that a graph keeps
# States of inputs without a recording: recorded at the next call, or always run in Python.
TO_RECORD, IN_PYTHON = "to record", "in Python"


class Replay:
    """A fused graph as a function of its inputs.

    The first call with inputs of new sizes runs in Python, and the second is recorded.

    Args:
        gm: the graph.
        watch: the node of the graph that gives the packed weights.
        varying: indices of the inputs whose sizes or values may change.
    """

    def __init__(self, gm: GraphModule, watch: Node, varying: Sequence[int]) -> None:
        assert isinstance(watch.target, Watch)
        self.gm, self.watch, self.varying = gm, watch.target, list(varying)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        # Dynamo passes Python numbers that may change as tensors, on which the graph calls item().
        self.numbers = [i for i in self.varying if _is_number(placeholders[i])]
        self.attributes = [str(n.target) for n in gm.graph.nodes if n.op == "get_attr"]
        watched: list[Any] = list(watch.args)
        self.watched: list[int | str] = [
            placeholders.index(n) if n.op == "placeholder" else str(n.target) for n in watched
        ]
        self.states: dict[tuple[Any, ...], Recording | str] = {}
        self.lock = threading.Lock()  # held while ``states`` is changed

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph, and return what it returns."""
        key = self._key(inputs)
        state = self.states.get(key)
        if state is None:  # without the C++ extension a recording cannot be run
            self._note(key, IN_PYTHON if isa() == "none" else TO_RECORD)
        if state is None or state is IN_PYTHON:
            return self.gm.forward(*inputs)
        weights = self._weights(inputs)
        if isinstance(state, Recording):
            return state.run(inputs, weights)
        if not all(any(weight.tensors()) for weight in weights):
            return self.gm.forward(*inputs)  # new weights, which this call makes or packs
        recorder = Recorder(self._names(inputs, weights), [inputs[i] for i in self.numbers])
        with recorder:
            result = self.gm.forward(*inputs)
        recording = recorder.finish(result)
        if not recorder.packs:
            self._note(key, recording or IN_PYTHON)
        return result

    def _note(self, key: tuple[Any, ...], state: Recording | str) -> None:
        with self.lock:
            self.states.pop(key, None)
            while len(self.states) >= MOST_RECORDINGS:
                del self.states[next(iter(self.states))]
            self.states[key] = state

    def _key(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Everything that decides which operations the graph runs."""
        key: list[Any] = [torch.get_num_threads(), current()]
        for i in self.varying:
            x = inputs[i]
            if i in self.numbers:
                key.append(x.item())
            elif isinstance(x, Tensor):
                key.append((x.shape, x.stride(), x.dtype))
            else:
                key.append((type(x), x))
        return tuple(key)

    def _weights(self, inputs: Sequence[Any]) -> list[PackedWeight]:
        parameters = [
            inputs[w] if isinstance(w, int) else attrgetter(w)(self.gm) for w in self.watched
        ]
        return self.watch(*parameters)  # type: ignore[return-value]

    def _names(
        self, inputs: Sequence[Any], weights: Sequence[PackedWeight]
    ) -> Iterator[tuple[Tensor, Source]]:
        """Every tensor that exists before the graph runs, and its source at a later call."""
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor):
                yield x, partial(_input, i)
        for name in self.attributes:
            if isinstance(x := attrgetter(name)(self.gm), Tensor):
                yield x, partial(_constant, self.gm, name)
        for i, weight in enumerate(weights):
            for form, x in weight.tensors():
                if isinstance(form, torch.dtype):
                    yield x, partial(_plain, i, form)
                else:
                    yield x, partial(_weight if form in ("weight", "bias") else _packed, i, form)


def _input(i: int, inputs: Sequence[Any], _: Sequence[PackedWeight]) -> Any:
    return inputs[i]


def _constant(gm: GraphModule, name: str, *_: Any) -> Any:
    return attrgetter(name)(gm)


def _weight(i: int, name: str, _: Sequence[Any], weights: Sequence[PackedWeight]) -> Any:
    return getattr(weights[i], name)


def _packed(i: int, algorithm: str, _: Sequence[Any], weights: Sequence[PackedWeight]) -> Any:
    return weights[i].packed(algorithm)


def _plain(i: int, dtype: torch.dtype, _: Sequence[Any], weights: Sequence[PackedWeight]) -> Any:
    return weights[i].plain(dtype)


def _is_number(node: Node) -> bool:
    return bool(node.users) and all(
        user.op == "call_method" and user.target == "item" for user in node.users
    )
