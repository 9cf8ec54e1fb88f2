"""Why a module cannot be compiled, found without running it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastdiff.acceleration.compiled_parts import CALL, is_compiled_here
from fastdiff.compiler import dynamo
from fastdiff.ops.backend import cpu_missing, triton_missing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights


def obstacle(part: nn.Module) -> str | None:
    """Why a module is left as it is; None where it can be compiled."""
    off = dynamo.why_off()
    if off:
        return f"nothing is compiled in this process: {'; '.join(off)}"
    for name, module in part.named_modules():
        why = own_obstacle(module)
        if why is not None:
            return f"its part {name} is {why}" if name else f"it is {why}"
    return _weights(part) or _device(part)


def own_obstacle(module: nn.Module) -> str | None:
    """What somebody else has done to a module itself, besides its parts: the end of "it is ..."."""
    if hasattr(module, "_orig_mod"):  # what torch.compile(module) returns
        return "wrapped by torch.compile already: give accelerate the module itself"
    for name, value in module.__dict__.items():
        ours = name == CALL and is_compiled_here(module)
        if hasattr(value, "_torchdynamo_orig_callable") and not ours:
            method = "" if name == CALL else f" (its {name})"
            return f"compiled already, by other than fastdiff.accelerate{method}"
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        return f"moved between devices at every call, by accelerate's hook {type(hook).__name__}"
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return f"changed at every call by diffusers' hook {next(iter(hooks))}" if hooks else None


def devices(part: nn.Module) -> set[str]:
    """The types of the devices of a module's parameters and buffers."""
    return {x.device.type for x in chain(part.parameters(), part.buffers())}


def _weights(part: nn.Module) -> str | None:
    if getattr(part, "hf_quantizer", None) is not None or getattr(part, "is_quantized", False):
        return "its weights are quantised"
    for name, weight in part.named_parameters():
        if is_traceable_wrapper_subclass(weight):
            kind = type(weight.data if type(weight) is nn.Parameter else weight).__name__
            return f"its weight {name} is a {kind}: quantised or distributed"
        if weight.dtype not in DTYPES:
            wanted = ", ".join(_short(dtype) for dtype in DTYPES)
            return f"its weight {name} is {_short(weight.dtype)}, wanted one of {wanted}"
    return None


def _device(part: nn.Module) -> str | None:
    found = devices(part)
    if found - {"cpu", "cuda"} or len(found) > 1:
        names = " and ".join(sorted(found))
        return f"its weights are on {names}, wanted all on a CPU or all on an NVIDIA GPU"
    if "cuda" not in found and cpu_missing is not None:
        return f"its weights are on a CPU, for which the C++ extension is needed: {cpu_missing}"
    if "cuda" in found and triton_missing is not None:
        return f"its weights are on a GPU, for which Triton is needed: {triton_missing}"
    return None


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
