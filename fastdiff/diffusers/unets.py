"""diffusers' U-Nets, the same classes but for their ``forward``, which fastdiff's compiler runs.

A model of these classes is one of diffusers': its name, signature, configuration, files, and every
method that diffusers or peft calls on it. Its first call compiles it by the backend ``fastdiff``,
with gradients or without; a call of other sizes, or after a change of its layers, compiles what it
needs. What that keeps is no part of the model: a copy, a pickle or a saved model is without it and
compiles anew.

diffusers' own ``forward`` runs where another tool looks into the call (``torch.compile``,
``torch.export``, tracing, transforms of ``torch.func``, modes that observe operations), and after a
warning where nothing can be compiled.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel as _Conditional
from diffusers import UNet2DModel as _Unconditional
from torch import Tensor, nn

from fastdiff.common.per_model import PerModel, with_own_code
from fastdiff.compiler import dynamo
from fastdiff.compiler.network import is_watched
from fastdiff.ops.backend import triton_missing

log = logging.getLogger("fastdiff.diffusers")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class UNet2DModel(_Unconditional):
    """``diffusers.UNet2DModel``, whose forward fastdiff's compiler runs.

    Arguments, methods and files are those of diffusers, where they are documented. Results in
    float32 differ from diffusers' by at most 2e-5 in relative L2 norm.
    """

    @functools.wraps(_Unconditional.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _record_as(self, _Unconditional)

    @functools.wraps(_Unconditional.forward)
    def forward(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of diffusers' ``forward``, compiled."""
        if not isinstance(timestep, Tensor):
            timestep = _as_tensor(timestep, sample, torch.int64)
        return _run(_Unconditional.forward, self, sample, timestep, *args, **kwargs)


class UNet2DConditionModel(_Conditional):
    """``diffusers.UNet2DConditionModel``, whose forward fastdiff's compiler runs.

    Arguments, methods and files are those of diffusers, where they are documented. Results in
    float32 differ from diffusers' by at most 2e-5 in relative L2 norm.
    """

    @functools.wraps(_Conditional.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _record_as(self, _Conditional)

    @functools.wraps(_Conditional.forward)
    def forward(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of diffusers' ``forward``, compiled."""
        if not isinstance(timestep, Tensor):
            dtype = torch.float64 if isinstance(timestep, float) else torch.int64
            timestep = _as_tensor(timestep, sample, dtype)
        return _run(_Conditional.forward, self, sample, timestep, *args, **kwargs)


def _record_as(model: Any, original: Any) -> None:
    """Have pipelines that hold ``model`` name the class of diffusers in their files.

    A pipeline records the module of a component as the object gives it, while pickle asks the
    object's class. So a saved pipeline loads where there is no fastdiff.
    """
    model.__module__ = original.__module__


def _as_tensor(timestep: Any, sample: Tensor, dtype: torch.dtype) -> Any:
    """A timestep as the tensor that diffusers makes of it.

    Made before the compiled call, because a number would be a constant of its graph.
    """
    if not isinstance(sample, Tensor) or sample.device.type not in ("cpu", "cuda"):
        return timestep  # other devices have other dtypes of numbers
    return torch.tensor([timestep], dtype=dtype, device=sample.device)


def _call(forward: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return forward(model, *args, **kwargs)


def _compile() -> Callable[..., Any]:
    return torch.compile(with_own_code(_call), backend="fastdiff")


_compiled = PerModel(_compile)


def _run(forward: Callable[..., Any], model: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``forward(model, sample, ...)``, compiled where it can be."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_watched():
        return forward(model, sample, *args, **kwargs)
    reason = _why_not(sample)
    if reason is not None:
        _say(reason)
        return forward(model, sample, *args, **kwargs)
    return _compiled[model](forward, model, sample, *args, **kwargs)


def _why_not(sample: Tensor) -> str | None:
    """Why nothing can be compiled for these images; None if it can."""
    if sample.dtype not in _DTYPES:
        return f"images are {sample.dtype}, wanted float32, bfloat16 or float16"
    if sample.is_cuda and triton_missing is not None:
        return f"the compiler needs Triton for tensors on CUDA devices: {triton_missing}"
    return "; ".join(dynamo.why_off()) or None


@functools.cache
def _say(reason: str) -> None:
    log.warning("U-Nets run as diffusers wrote them: %s", reason)
