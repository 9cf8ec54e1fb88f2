"""Which U-Nets may have their embeddings computed before the sampling loop, for all its steps.

``fastdiff.nn.UNet2DModel.precompute`` skips calls that the plain model makes at every step. That is
the same only where nothing but the library's own code sees or answers these calls, so a model is
called plainly as soon as anything else might.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from fastdiff.nn import ResnetBlock2D, UNet2DModel
from fastdiff.nn.embeddings import FourierProjection, SinusoidalProjection, TimestepEmbedding

# Modules that treat every row by itself and alike at every call.
_BY_ROW = (
    FourierProjection,
    SinusoidalProjection,
    TimestepEmbedding,
    nn.Embedding,
    nn.Identity,
    nn.Linear,
)
# What a subclass must not replace: all that the class itself defines but how it is made.
_METHODS: dict[str, Any] = {
    name: value
    for name, value in vars(UNet2DModel).items()
    if isinstance(value, (FunctionType, property)) and name != "__init__"
} | {"__call__": nn.Module.__call__, "__getattr__": nn.Module.__getattr__}


def precomputing_unet(model: Any) -> UNet2DModel | None:
    """The U-Net behind ``model`` if its embeddings may be computed beforehand, else None.

    They may not where a subclass or the instance has a method of its own, where a hook is
    registered on the model, on a module whose calls are skipped or on all modules, where one of
    these modules is of a foreign kind (a parametrised or wrapped linear layer, say), or where the
    model is inside anything but ``torch.compile``.
    """
    unet = model
    if _is_compiled(model):
        if _is_changed(model) or not hasattr(model.forward, "_torchdynamo_orig_callable"):
            return None
        unet = model._orig_mod
    if not isinstance(unet, UNet2DModel) or _is_changed(unet):
        return None
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    if any(getattr(type(unet), name) is not value for name, value in _METHODS.items()):
        return None
    if not vars(unet).keys().isdisjoint(_METHODS):
        return None
    for part in _skipped(unet):
        if type(part) not in _BY_ROW or _is_changed(part) or "forward" in vars(part):
            return None
    return unet


def _skipped(unet: UNet2DModel) -> Iterator[nn.Module]:
    """The modules that are not called in a loop with precomputed embeddings."""
    roots = [unet.time_proj, unet.time_embedding, unet.class_embedding]
    roots += [part.time_emb_proj for part in unet.modules() if isinstance(part, ResnetBlock2D)]
    for root in roots:
        if root is not None:
            yield from root.modules()


def _is_changed(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_compiled(model: Any) -> bool:
    """Whether it is what torch.compile makes of a module; without importing Dynamo."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and type(model) is dynamo.OptimizedModule
