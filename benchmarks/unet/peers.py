"""How each peer prepares a network: as its users would, with its fastest settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.turns.job import DTYPES, OURS, Job
from benchmarks.unet.models import Network
from benchmarks.unet.prepared import Prepared


def in_layout(module: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The module with its convolutions' weights in a memory format."""
    return module.to(memory_format=layout)  # type: ignore[call-overload]


class Peer:
    """One way to run a network.

    Attributes:
        summary: the kind of peer; tables show the fastest peer of each kind.
        dtypes: dtypes that the peer is timed with.
    """

    def __init__(self, summary: str, dtypes: tuple[str, ...] = tuple(DTYPES)) -> None:
        self.summary, self.dtypes = summary, dtypes

    def prepare(self, job: Job, network: Network, module: nn.Module) -> Prepared:
        """Prepare a module for the calls to time; the peer may change the module."""
        raise NotImplementedError


class Torch(Peer):
    """PyTorch, eager or through a Dynamo backend.

    Args:
        summary, dtypes: see ``Peer``.
        backend: of torch.compile; None is eager.
        channels_last: of the weights and the inputs.
        frozen: Inductor treats the weights as constants and packs them.
        mode, options: of torch.compile.
        model_dtype: of the module and its inputs, where it is not the dtype of computation.
    """

    def __init__(
        self,
        summary: str,
        dtypes: tuple[str, ...] = tuple(DTYPES),
        *,
        backend: str | None = None,
        channels_last: bool = False,
        frozen: bool = False,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        model_dtype: str | None = None,
    ) -> None:
        super().__init__(summary, dtypes)
        self.backend, self.channels_last, self.frozen = backend, channels_last, frozen
        self.mode, self.options, self.model_dtype = mode, options, model_dtype

    def prepare(self, job: Job, network: Network, module: nn.Module) -> Prepared:
        dtype = DTYPES[self.model_dtype or job.case.dtype]
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        module = in_layout(module.to(dtype), layout)
        if self.frozen:
            import torch._inductor.config as inductor

            inductor.freezing = True
        if self.backend == OURS:
            import fastdiff.compiler  # noqa: F401 - registers it, installed or not
        run: Callable[..., Any] = module
        if self.backend is not None:
            run = torch.compile(
                module,
                backend=self.backend,
                mode=self.mode,
                options=copy.deepcopy(self.options),
                dynamic=False,
            )
        return Prepared(lambda *inputs: network.call(run, *inputs), dtype, layout)


class OnnxRuntime(Peer):
    def prepare(self, job: Job, network: Network, module: nn.Module) -> Prepared:
        from benchmarks.unet import runtimes

        return runtimes.onnxruntime(job, network, module)


class OpenVino(Peer):
    def prepare(self, job: Job, network: Network, module: nn.Module) -> Prepared:
        from benchmarks.unet import runtimes

        return runtimes.openvino(job, network, module)


INDUCTOR = "torch.compile, Inductor"
PEERS: dict[str, Peer] = {
    OURS: Torch("fastdiff", backend="fastdiff"),
    "fastdiff strict": Torch(
        "fastdiff, strict precision",
        ("float32",),
        backend="fastdiff",
        options={"precision": "strict"},
    ),
    "fastdiff bf16": Torch(
        "fastdiff, float32 model computed in bfloat16",
        ("bfloat16",),
        backend="fastdiff",
        options={"precision": "bf16"},
        model_dtype="float32",
    ),
    "openvino": OpenVino("OpenVINO"),
    "onnxruntime": OnnxRuntime("ONNX Runtime"),
    "inductor": Torch(INDUCTOR, backend="inductor"),
    "inductor channels_last": Torch(INDUCTOR, backend="inductor", channels_last=True),
    "inductor, frozen": Torch(INDUCTOR, backend="inductor", frozen=True),
    "inductor channels_last, frozen": Torch(
        INDUCTOR, backend="inductor", channels_last=True, frozen=True
    ),
    "inductor channels_last, frozen, max-autotune": Torch(
        INDUCTOR,
        backend="inductor",
        channels_last=True,
        frozen=True,
        mode="max-autotune-no-cudagraphs",
    ),
    "eager": Torch("diffusers, eager, NCHW"),
    "eager channels_last": Torch("diffusers, eager, channels_last", channels_last=True),
}
