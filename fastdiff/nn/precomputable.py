"""Whether a U-Net's embeddings, or its layers, may be computed in another way than by its calls.

``precompute`` of the networks of ``fastdiff.nn`` skips calls that the plain model makes at every
step, and a graph of the layers stands for all others. The result is the same only if the library's
own code alone sees or answers these calls. Where other code might, such as a hook, the model is
called plainly.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fastdiff.common.model import has_hooks
from fastdiff.nn.blocks import DownBlock2D, UNetMidBlock2D, UpBlock2D
from fastdiff.nn.embeddings import FourierProjection, SinusoidalProjection, TimestepEmbedding
from fastdiff.nn.karras_blocks import CosineAttention, DecoderBlock, EncoderBlock
from fastdiff.nn.magnitude_preserving import MPConv2d, MPEmbedding, MPFourier, MPLinear
from fastdiff.nn.norm import GroupNormSiLU
from fastdiff.nn.resample import Downsample2D, NearestUpsample2x, Upsample2D
from fastdiff.nn.resnet import ResnetBlock2D
from fastdiff.nn.self_attention import Attention, FrameAttention

# Modules that compute each row independently of the others, and the same at every call.
_BY_ROW = (
    FourierProjection,
    MPEmbedding,
    MPFourier,
    MPLinear,
    SinusoidalProjection,
    TimestepEmbedding,
    nn.Embedding,
    nn.Identity,
    nn.Linear,
)

# All others that a U-Net is made of.
_LAYERS = (
    Attention,
    CosineAttention,
    DecoderBlock,
    Downsample2D,
    DownBlock2D,
    EncoderBlock,
    FrameAttention,
    GroupNormSiLU,
    MPConv2d,
    NearestUpsample2x,
    ResnetBlock2D,
    UNetMidBlock2D,
    UpBlock2D,
    Upsample2D,
    nn.AvgPool2d,
    nn.Conv2d,
    nn.Dropout,
    nn.ModuleList,
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def only_own_code_runs(unet: Any, original: type[nn.Module]) -> bool:
    """Whether only the code of ``original`` sees or answers the calls of the embeddings.

    Other code does if a subclass or the instance has a method of its own, if a hook is registered
    on the model, on a module whose calls are skipped or on all modules, or if one of the skipped
    modules has a foreign type (for example a parametrised or wrapped linear layer).

    Args:
        unet: an instance of ``original``, whose ``of_embeddings`` names the modules whose calls
            are skipped.
        original: the class whose ``precompute`` skips calls.
    """
    if has_hooks(unet):
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    methods = _methods(original)  # type: ignore[arg-type]  # classes are hashable
    if any(getattr(type(unet), name) is not value for name, value in methods.items()):
        return False
    if not vars(unet).keys().isdisjoint(methods):
        return False
    skipped = (part for root in unet.of_embeddings() for part in root.modules())
    return all(type(part) in _BY_ROW and _is_plain(part) for part in skipped)


def only_own_layers_run(unet: Any, original: type[nn.Module]) -> bool:
    """Whether, besides, nothing else sees or answers the calls of any module.

    A part that is compiled, or in another mode (training or evaluation) than the U-Net, or weights
    that are no plain parameters of one dtype on a CPU, float32, bfloat16 or float16, count as
    something else.

    Args:
        unet: an instance of ``original``.
        original: the class whose ``layers`` calls the modules.
    """
    if not only_own_code_runs(unet, original) or unet._compiled_call_impl is not None:
        return False
    parts = unet.modules()
    next(parts)  # the U-Net itself
    for part in parts:
        if type(part) not in _BY_ROW and type(part) not in _LAYERS:
            return False
        if not _is_plain(part) or part._compiled_call_impl is not None:
            return False
        if part.training != unet.training:
            return False
    weights = list(unet.parameters())
    dtype = weights[0].dtype
    return dtype in _DTYPES and all(
        type(weight) is nn.Parameter and weight.is_cpu and weight.dtype == dtype
        for weight in weights
    )


def _is_plain(part: nn.Module) -> bool:
    """Whether a module's calls are seen and answered by its class alone."""
    return not has_hooks(part) and "forward" not in vars(part)


@cache
def _methods(original: type[nn.Module]) -> dict[str, Any]:
    """The methods and properties that a subclass must not replace: all but ``__init__``."""
    classes = original.__mro__[: original.__mro__.index(nn.Module)]
    return {
        name: value
        for base in reversed(classes)
        for name, value in vars(base).items()
        if isinstance(value, (FunctionType, property)) and name != "__init__"
    } | {"__call__": nn.Module.__call__, "__getattr__": nn.Module.__getattr__}
