"""How each peer accelerates a pipeline: as its users would, with its fastest settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.turns.job import DTYPES, OURS, Case

EAGER = "eager"


@dataclass(frozen=True)
class Peer:
    """One way to run a pipeline.

    Attributes:
        title: in tables; of several peers with one title the fastest is shown.
        prepare: makes the pipeline fast, in place, and returns remarks for the report.
        model_dtype: of the pipeline and its inputs, where it is not that of the case.
    """

    title: str
    prepare: Callable[[Any, Case], list[str]]
    model_dtype: str | None = None

    def dtype(self, case: Case) -> torch.dtype:
        """The dtype of the pipeline's weights and inputs in a case."""
        return DTYPES[self.model_dtype or case.dtype]


def _accelerated(pipe: Any, case: Case) -> list[str]:
    import fastdiff

    fastdiff.accelerate(pipe)
    return []


def _eager(pipe: Any, case: Case) -> list[str]:
    return []


def _channels_last(pipe: Any, case: Case) -> list[str]:
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    return []


def _inductor(pipe: Any, case: Case) -> list[str]:
    import torch._inductor.config as inductor

    inductor.freezing = True
    _channels_last(pipe, case)
    pipe.unet.compile(backend="inductor", dynamic=False)
    pipe.vae.decoder.compile(backend="inductor", dynamic=False)
    return []


def _openvino(pipe: Any, case: Case) -> list[str]:
    """U-Net and decoder as OpenVINO's models inside the pipeline, which keeps their outputs."""
    from benchmarks.unet.runtimes import openvino_model

    size = pipe.unet.config.sample_size
    context = pipe.unet.config.cross_attention_dim
    inputs = (
        torch.zeros(2 * case.batch, 4, size, size), torch.tensor(1),
        torch.zeros(2 * case.batch, 77, context),
    )  # fmt: skip
    latents = torch.zeros(case.batch, 4, size, size)
    unet, notes = openvino_model(_OneOutput(pipe.unet), inputs, case)
    decoder, _ = openvino_model(pipe.vae.decoder, (latents,), case)

    def evaluate(x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (unet(x, t, encoder_hidden_states).clone(),)

    pipe.unet.forward = evaluate
    pipe.vae.decoder.forward = lambda *given: decoder(*given).clone()
    return notes


class _OneOutput(nn.Module):
    """A U-Net as a function of tensors, for the converter."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Any:
        return self.unet(x, t, context, return_dict=False)[0]


PEERS = {
    OURS: Peer("fastdiff.accelerate", _accelerated),
    "openvino": Peer("OpenVINO", _openvino, model_dtype="float32"),
    "inductor": Peer("torch.compile, Inductor, frozen, channels_last", _inductor),
    "eager channels_last": Peer("diffusers, eager", _channels_last),
    EAGER: Peer("diffusers, eager", _eager),
}
