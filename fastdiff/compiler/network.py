"""Call a network of this library through a fused graph of its layers, made without Dynamo.

A graph depends on the network's modules, their types and settings, and on the shapes and strides of
its parameters. These are compared whenever a ``FusedNetwork`` is made. The parameters' values are
inputs of the graph, and ``run.packing`` checks at every call whether they have changed.

Algorithms are chosen by the sizes alone unless FASTDIFF_PLAN is ``measured``: the same seed then
gives the same images in every process, and the first call measures nothing. For the digits model
that comes with fastdiff, 50 images on one core with AVX512, that choice is as fast as the measured
one, to within 5%.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastdiff.common.model import Layered
from fastdiff.common.per_model import PerModel
from fastdiff.compiler.choose import timings
from fastdiff.compiler.inference import Compiled, fused
from fastdiff.compiler.report import GraphReport
from fastdiff.compiler.rewrite.autocast import Autocast
from fastdiff.compiler.trace import BATCH, NotTraceableError, trace
from fastdiff.compiler.training import trained
from fastdiff.ops.backend import kernel_runs

MOST_GRAPHS = 16  # kept of a network; the least recently used graph is dropped first
_SETTINGS = (bool, int, float, str, tuple, type(None))  # of attributes of a module
_Graph = tuple[Compiled, Sequence[int]]  # a graph, and the indices of the parameters it reads
_lock = threading.RLock()
_graphs: PerModel[OrderedDict[Hashable, _Graph | None]] = PerModel(OrderedDict)


class FusedNetwork(nn.Module):
    """Calls a network through fused graphs of its layers, one for each size of image.

    Under autocast the graph computes as autocast does. float16 networks are computed in float32
    (``rewrite.lower``). The network itself is called where no graph can replace the call: with
    gradients, with tensors that are not on a CPU, on the reference backend, and under modes that
    observe PyTorch's calls. Make a new ``FusedNetwork`` after the network's
    modules have been changed. New values of parameters are seen at every call.

    Args:
        network: a network for which ``fastdiff.common.model.layered`` holds.
    """

    _with_gradients = False  # the mode in which a graph replaces the network

    def __init__(self, network: Layered) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        weights = list(network.named_parameters(remove_duplicate=False))
        self._weights = [weight for _, weight in weights]
        self._by_size: dict[Hashable, _Graph | None] = {}  # the graphs that this instance has used
        chosen = timings.measured("heuristic")
        self._key = (self._with_gradients, chosen, *_signature(network, weights))

    def may_precompute(self) -> bool:
        """Whether a sampling loop may use :meth:`precompute`; the network decides."""
        return self.network.may_precompute()

    def precompute(self, *args: Any, **kwargs: Any) -> Any:
        """The network's embeddings of timesteps and class labels, which its layers read."""
        return self.network.precompute(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The result of the network's ``forward``."""
        if args and self._can_replace_call(args[0]):
            return self.network.through(self._layers, *args, **kwargs)
        return self.network(*args, **kwargs)

    def _can_replace_call(self, x: Any) -> bool:
        """Whether a graph computes what the network computes of x, in the present modes."""
        weight = self._weights[0]
        return (
            type(x) is Tensor
            and not torch.compiler.is_compiling()
            and x.ndim in (3, 4, 5)
            and x.numel() > 0
            and x.dtype == weight.dtype
            and x.is_cpu
            and kernel_runs(x)
            and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
            and torch.is_grad_enabled() == self._with_gradients
            and not is_watched()
        )

    def _layers(self, x: Tensor, rows: Tensor) -> Tensor:
        """The network's layers of samples [N, C, ...] and embeddings [N or 1, P]."""
        kind = rows.shape[0] == 1, rows.dtype, Autocast.around()
        sizes = (tuple(x.shape[1:]), x.stride()[1:], *kind)
        if sizes not in self._by_size:
            self._by_size[sizes] = self._graph(sizes, x, rows)
        entry = self._by_size[sizes]
        if entry is None:
            return self.network.layers(x, rows)
        graph, read = entry
        weights = self._weights
        return graph(x, rows, *[weights[i] for i in read])[0]

    def _graph(self, sizes: Hashable, x: Tensor, rows: Tensor) -> _Graph | None:
        key = (self._key, sizes)
        with _lock:
            graphs = _graphs[self.network]
            if key not in graphs:
                graphs[key] = self._compile(x, rows)
                while len(graphs) > MOST_GRAPHS:
                    graphs.popitem(last=False)
            graphs.move_to_end(key)
            return graphs[key]

    def _compile(self, x: Tensor, rows: Tensor) -> _Graph | None:
        # Several images of zeros: with one, an expansion to the batch could not be recognised.
        _, *shape = x.shape
        strides = (x[0].numel(), *x.stride()[1:])
        like_x = torch.empty_strided((BATCH, *shape), strides, dtype=x.dtype, device="cpu").zero_()
        count = 1 if rows.shape[0] == 1 else BATCH
        like_rows = torch.zeros(count, rows.shape[1], dtype=rows.dtype, device="cpu")
        try:
            with Autocast.around().without_cache():
                gm, read = trace(self.network.layers, (like_x, like_rows), self._weights)
        except NotTraceableError:
            return None
        return self._finish(gm), read

    def _finish(self, gm: GraphModule) -> Compiled:
        return fused(gm, GraphReport(), measured=timings.measured("heuristic"))


class TrainedNetwork(FusedNetwork):
    """The same with gradients, for a network in training mode or not, dropout included.

    The network itself is called without gradients. A gradient cannot be differentiated again.
    Algorithms are chosen by the sizes alone, whatever FASTDIFF_PLAN says.
    """

    _with_gradients = True

    def _compile(self, x: Tensor, rows: Tensor) -> _Graph | None:
        with torch.random.fork_rng(devices=()):  # the run draws dropout's numbers
            return super()._compile(x, rows)

    def _finish(self, gm: GraphModule) -> Compiled:
        return trained(gm, GraphReport())


def is_watched() -> bool:
    """Whether a mode of PyTorch observes or changes calls, such as forward-mode differentiation."""
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if not torch._C._len_torch_function_stack():
        return False
    # The mode of torch.set_default_device only changes calls without tensors.
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _signature(network: Any, weights: Sequence[tuple[str, nn.Parameter]]) -> Iterator[Hashable]:
    """Everything but the parameters' values on which a graph of the network's layers depends."""
    for name, part in network.named_modules():
        yield name, type(part), tuple(v for v in vars(part).values() if isinstance(v, _SETTINGS))
    places: dict[int, int] = {}
    for i, (name, weight) in enumerate(weights):
        place = places.setdefault(id(weight), i)  # the same for all names of a shared parameter
        yield name, place, weight.dtype, tuple(weight.shape), weight.stride()
