"""A network of this library that is called through a fused graph of its layers, without Dynamo.

A graph depends on the network's modules, their types and settings, and on the shapes and strides of
its parameters; these are compared whenever a ``FusedNetwork`` is made. The parameters' values are
inputs of the graph, and ``run.packing`` looks at every call whether they have changed.

Algorithms are chosen by the sizes alone, unless FASTDIFF_PLAN says otherwise: the same seed then
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
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastdiff.common.model import Layered
from fastdiff.common.per_model import PerModel
from fastdiff.compiler.choose import timings
from fastdiff.compiler.inference import Compiled, fused
from fastdiff.compiler.report import GraphReport
from fastdiff.compiler.trace import BATCH, NotTraceableError, trace
from fastdiff.ops.backend import kernel_runs

KEPT = 16  # graphs of a network; the one unused for longest goes
_PLAIN = (bool, int, float, str, tuple, type(None))  # settings of a module
_Graph = tuple[Compiled, Sequence[int]]  # and which parameters it reads
_lock = threading.RLock()
_graphs: PerModel[OrderedDict[Hashable, _Graph | None]] = PerModel(OrderedDict)


class FusedNetwork(nn.Module):
    """Calls a network through fused graphs of its layers, one for each size of image.

    A call that a graph cannot stand for is the network's own: with gradients, under autocast, of
    other tensors than float32 or bfloat16 on a CPU, on the reference backend, under modes that see
    PyTorch's calls. Make it anew after the network's modules have been changed; new values of
    parameters are seen at every call.

    Args:
        network: one for which ``fastdiff.common.model.layered`` holds.
    """

    def __init__(self, network: Layered) -> None:
        super().__init__()
        self.network = network
        self.training = False
        weights = list(network.named_parameters(remove_duplicate=False))
        self._weights = [weight for _, weight in weights]
        self._found: dict[Hashable, _Graph | None] = {}  # in this run, of ``_graphs``
        self._key = (timings.measured("heuristic"), *_signature(network, weights))

    def may_precompute(self) -> bool:
        """Whether a sampling loop may use :meth:`precompute`: as the network says."""
        return self.network.may_precompute()

    def precompute(self, *args: Any, **kwargs: Any) -> Any:
        """What the network's layers take from timesteps and class labels."""
        return self.network.precompute(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the network's ``forward`` gives."""
        if args and self._stands_for_call_on(args[0]):
            return self.network.through(self._layers, *args, **kwargs)
        return self.network(*args, **kwargs)

    def _stands_for_call_on(self, x: Any) -> bool:
        weight = self._weights[0]
        return (
            type(x) is Tensor
            and not torch.compiler.is_compiling()
            and x.ndim == 4
            and x.numel() > 0
            and x.dtype == weight.dtype
            and x.is_cpu
            and kernel_runs(x)
            and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not _is_watched()
        )

    def _layers(self, x: Tensor, rows: Tensor) -> Tensor:
        """The network's layers of images [N, C, H, W] and embeddings [N or 1, P]."""
        sizes = (tuple(x.shape[1:]), x.stride()[1:], rows.shape[0] == 1)
        if sizes not in self._found:
            self._found[sizes] = self._graph(sizes, x, rows)
        found = self._found[sizes]
        if found is None:
            return self.network.layers(x, rows)
        graph, read = found
        weights = self._weights
        return graph(x, rows, *[weights[i] for i in read])[0]

    def _graph(self, sizes: Hashable, x: Tensor, rows: Tensor) -> _Graph | None:
        key = (self._key, sizes)
        with _lock:
            graphs = _graphs[self.network]
            if key not in graphs:
                graphs[key] = self._compile(x, rows)
                while len(graphs) > KEPT:
                    graphs.popitem(last=False)
            graphs.move_to_end(key)
            return graphs[key]

    def _compile(self, x: Tensor, rows: Tensor) -> _Graph | None:
        # Of zeros like x, since one image would not tell what is for all of them.
        _, *shape = x.shape
        strides = (x[0].numel(), *x.stride()[1:])
        like_x = torch.empty_strided((BATCH, *shape), strides, dtype=x.dtype, device="cpu").zero_()
        count = 1 if rows.shape[0] == 1 else BATCH
        like_rows = torch.zeros(count, rows.shape[1], dtype=rows.dtype, device="cpu")
        try:
            gm, read = trace(self.network.layers, (like_x, like_rows), self._weights)
        except NotTraceableError:
            return None
        return fused(gm, GraphReport(), measured=timings.measured("heuristic")), read


def _is_watched() -> bool:
    """Whether something beside this library sees or changes calls of PyTorch."""
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if not torch._C._len_torch_function_stack():
        return False
    # What torch.set_default_device puts there looks at calls without tensors alone.
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _signature(network: Any, weights: Sequence[tuple[str, nn.Parameter]]) -> Iterator[Hashable]:
    """All that a graph of the network's layers depends on but its parameters' values."""
    for name, part in network.named_modules():
        yield name, type(part), tuple(v for v in vars(part).values() if isinstance(v, _PLAIN))
    places: dict[int, int] = {}
    for i, (name, weight) in enumerate(weights):
        place = places.setdefault(id(weight), i)  # that of the first, where several share one
        yield name, place, weight.dtype, tuple(weight.shape), weight.stride()
