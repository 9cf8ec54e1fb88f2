"""Whether a U-Net's embeddings may be computed before a sampling loop, for all its steps.

``fastdiff.nn.UNet2DModel.precompute`` skips calls that the plain model makes at every step. The
result is the same only if the library's own code alone sees or answers these calls. Where other
code might, such as a hook, the embeddings are computed at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from fastdiff.common.model import has_hooks
from fastdiff.nn.embeddings import FourierProjection, SinusoidalProjection, TimestepEmbedding
from fastdiff.nn.resnet import ResnetBlock2D

# Modules that compute each row independently of the others, and the same at every call.
_BY_ROW = (
    FourierProjection,
    SinusoidalProjection,
    TimestepEmbedding,
    nn.Embedding,
    nn.Identity,
    nn.Linear,
)


def only_own_code_runs(unet: nn.Module, original: type[nn.Module]) -> bool:
    """Whether only the code of ``original`` sees or answers the calls of the embeddings.

    Other code does if a subclass or the instance has a method of its own, if a hook is registered
    on the model, on a module whose calls are skipped or on all modules, or if one of the skipped
    modules has a foreign type (for example a parametrised or wrapped linear layer).

    Args:
        unet: an instance of ``original``.
        original: the class whose ``precompute`` skips calls, ``UNet2DModel``.
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
    return all(
        type(part) in _BY_ROW and not has_hooks(part) and "forward" not in vars(part)
        for part in _skipped(unet)
    )


@cache
def _methods(original: type[nn.Module]) -> dict[str, Any]:
    """The methods and properties that a subclass must not replace: all but ``__init__``."""
    return {
        name: value
        for name, value in vars(original).items()
        if isinstance(value, (FunctionType, property)) and name != "__init__"
    } | {"__call__": nn.Module.__call__, "__getattr__": nn.Module.__getattr__}


def _skipped(unet: Any) -> Iterator[nn.Module]:
    """The modules that are not called in a loop with precomputed embeddings."""
    roots = [unet.time_proj, unet.time_embedding, unet.class_embedding]
    roots += [part.time_emb_proj for part in unet.modules() if isinstance(part, ResnetBlock2D)]
    for root in roots:
        if root is not None:
            yield from root.modules()
