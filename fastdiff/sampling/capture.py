"""A sampling loop as a CUDA graph: one row captured, and replayed for every row.

A graph reads and writes the memory that it was captured with, so each has ``Buffers`` of its own,
into which a call's inputs are copied: other values, whole tables among them, never go stale. It is
captured anew for whatever it could not follow: other shapes, weights in other memory, and the
settings that decide which kernels run.
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

KEPT = 4  # graphs of a model, each with its memory; the one unused for longest goes
WARM_UP = 3  # rows that run before the capture, so that libraries have chosen their kernels

Replay = Callable[[], Tensor]


class CudaGraphs:
    """All that this module asks of CUDA."""

    def can_capture(self, device: torch.device) -> bool:
        """Whether work on that device can be captured."""
        return device.type == "cuda"

    def stream(self, device: torch.device) -> int:
        """The current stream, as a number."""
        return torch.cuda.current_stream(device).cuda_stream

    @contextmanager
    def side_stream(self, device: torch.device) -> Iterator[None]:
        """Run the block on another stream, in order with the current one before and after it."""
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            torch.cuda.current_stream(device).wait_stream(side)

    def capture(self, device: torch.device, run: Callable[[], Tensor]) -> Replay:
        """Capture run() without computing it; the result computes it and returns its tensor."""
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
    """A graph and what it works on; ``busy`` is held while a loop uses them."""

    buffers: Buffers
    replay: Replay
    busy: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False)
class Kept:
    """The graphs of a model, the one used last at the end; None where the capture failed."""

    captured: OrderedDict[Hashable, Captured | None] = field(default_factory=OrderedDict)
    warned: bool = False


_kept = PerModel(Kept)


@contextmanager
def captured_loop(model: Model, state: State) -> Iterator[Captured | None]:
    """The captured row of a model for a state, loaded with it and ready for its first row.

    When the block ends, x is copied to the state's. A model that is no ``nn.Module`` is captured in
    each call, since nothing tells whether the weights behind it are still where they were.

    Yields:
        The graph, or None where the loop must run without: the capture failed, of which the first
        of a model warns, or the same graph is at work further up the stack or in another thread.
    """
    given = Buffers(state)
    kept, key = _kept[model], _key(model, given)
    if key is None:
        found = _capture(model, given, kept)
    else:
        if key not in kept.captured:
            kept.captured[key] = _capture(model, given, kept)
            while len(kept.captured) > KEPT:
                kept.captured.popitem(last=False)
        kept.captured.move_to_end(key)
        found = kept.captured[key]
    if found is None or not found.busy.acquire(blocking=False):
        yield None
        return
    try:
        found.buffers.load(given)
        yield found
        state.x.copy_(found.buffers.x)
    finally:
        found.busy.release()


def _capture(model: Model, given: Buffers, kept: Kept) -> Captured | None:
    device = given.x.device

    def run() -> Tensor:
        output = advance(model, buffers)
        assert output is not None
        return output

    try:
        with _without_autocast_cache():
            buffers = given.copy()
            with graphs.side_stream(device):
                for _ in range(WARM_UP):
                    buffers.load(given)  # a table may have fewer rows than these
                    run()
            return Captured(buffers, graphs.capture(device, run))
    except Exception as error:  # whatever stands against it, the loop runs without
        if not kept.warned:
            kept.warned = True
            warnings.warn(
                f"fastdiff: {type(model).__name__} cannot be captured in a CUDA graph, so its "
                f"sampling loop runs eagerly: {type(error).__name__}: {error}",
                stacklevel=2,
            )
        return None


def _key(model: Model, given: Buffers) -> Hashable:
    """All that a graph depends on, or None where that cannot be told or compared."""
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
        torch.is_inference_mode_enabled(),  # its tensors cannot be written outside of it
        tuple(weights),
        tuple(module.training for module in model.modules()),
    )
    try:
        hash(key)
    except TypeError:  # for an argument of the model that has no hash
        return None
    return key


def _place(weight: Tensor) -> Hashable:
    """Where a weight lies and how; None for one that does not tell, such as a wrapper of others."""
    if type(weight) not in (Tensor, nn.Parameter):
        return None
    return weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride()


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Have autocast convert weights inside the graph: what it has kept goes when autocast ends."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
