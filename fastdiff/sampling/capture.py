"""A sampling loop as a CUDA graph: one row captured, and replayed for every row.

A graph reads and writes the memory that it was captured with. So each graph has its own
``Buffers``, into which a call's inputs are copied: new values, of tables too, are always used. A
new graph is captured for other shapes, for weights in other memory, and for other settings that
decide which kernels run.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastdiff.common.model import Model
from fastdiff.common.per_model import PerModel
from fastdiff.ops.backend import current as current_backend
from fastdiff.sampling.device_loop import Buffers, advance
from fastdiff.sampling.loop import State

MAX_GRAPHS = 4  # of a model, each with its own memory; the least recently used is dropped
WARM_UP_ROWS = 3  # run before the capture, so that libraries have chosen their kernels

Replay = Callable[[], Tensor]


class CudaGraphs:
    """The functions of CUDA that this module uses."""

    def can_capture(self, device: torch.device) -> bool:
        """Whether work on the device can be captured."""
        return device.type == "cuda"

    def stream(self, device: torch.device) -> int:
        """The current stream, as a number."""
        return torch.cuda.current_stream(device).cuda_stream

    @contextmanager
    def side_stream(self, device: torch.device) -> Iterator[None]:
        """Run the block on another stream, after earlier and before later work of the current."""
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            torch.cuda.current_stream(device).wait_stream(side)

    def capture(self, device: torch.device, run: Callable[[], Tensor]) -> Replay:
        """Capture ``run`` without computing it; the function returned computes its tensor."""
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        # Another thread, such as a data loader's, may allocate memory meanwhile.
        capturing = torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")
        with torch.cuda.device(device), capturing:
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


graphs = CudaGraphs()


@dataclass(eq=False)
class Captured:
    """A graph and its buffers; the lock ``busy`` is held while a loop uses them."""

    buffers: Buffers
    replay: Replay
    busy: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False)
class ModelGraphs:
    """The graphs of a model, the most recently used last; None where the capture failed."""

    captured: OrderedDict[Hashable, Captured | None] = field(default_factory=OrderedDict)
    warned: bool = False


_graphs_of = PerModel(ModelGraphs)


@contextmanager
def captured_loop(model: Model, state: State) -> Iterator[Captured | None]:
    """The captured graph of a model for a state, with the state's inputs loaded.

    When the block ends, the images are copied to the state's x. A model that is no ``nn.Module`` is
    captured in each call, since its weights cannot be compared with those of an earlier call.

    Yields:
        The graph, or None where the loop must run without a graph. This is so if the capture failed
        (the first failure of a model warns), or if the same graph is already running, further up
        the stack or in another thread.
    """
    given = Buffers(state)
    of_model, key = _graphs_of[model], _key(model, given)
    if key is None:
        graph = _capture(model, given, of_model)
    else:
        if key not in of_model.captured:
            of_model.captured[key] = _capture(model, given, of_model)
            while len(of_model.captured) > MAX_GRAPHS:
                of_model.captured.popitem(last=False)
        of_model.captured.move_to_end(key)
        graph = of_model.captured[key]
    if graph is None or not graph.busy.acquire(blocking=False):
        yield None
        return
    try:
        graph.buffers.load(given)
        yield graph
        state.x.copy_(graph.buffers.x)
    finally:
        graph.busy.release()


def _capture(model: Model, given: Buffers, of_model: ModelGraphs) -> Captured | None:
    """Capture a graph for inputs like ``given``; None, with a warning, if that fails."""
    device = given.x.device

    def run() -> Tensor:
        output = advance(model, buffers)
        assert output is not None
        return output

    try:
        with _without_autocast_cache():
            buffers = given.copy()
            with graphs.side_stream(device):
                for _ in range(WARM_UP_ROWS):
                    buffers.load(given)  # go back to the first row: a table may have no second
                    run()
            return Captured(buffers, graphs.capture(device, run))
    except Exception as error:  # for any reason: the loop can run without a graph
        if not of_model.warned:
            of_model.warned = True
            warnings.warn(
                f"fastdiff: {type(model).__name__} cannot be captured in a CUDA graph, so its "
                f"sampling loop runs eagerly: {type(error).__name__}: {error}",
                stacklevel=2,
            )
        return None


def _key(model: Model, given: Buffers) -> Hashable:
    """A key of everything that a graph depends on, or None if that is unknown or has no hash."""
    if not isinstance(model, nn.Module):
        return None
    device = given.x.device
    weights = [_place(weight) for weight in (*model.parameters(), *model.buffers())]
    if None in weights:
        return None
    key = (
        given.signature(),
        graphs.stream(device),
        current_backend(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),  # tensors made in this mode cannot be written outside it
        tuple(weights),
        tuple(module.training for module in model.modules()),
    )
    try:
        hash(key)
    except TypeError:  # an argument of the model has no hash
        return None
    return key


def _place(weight: Tensor) -> Hashable:
    """A weight's address and layout; None for a subclass, which may wrap other tensors."""
    if type(weight) not in (Tensor, nn.Parameter):
        return None
    return weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride()


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Let autocast convert weights inside the graph: its cached copies are freed when it ends."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
