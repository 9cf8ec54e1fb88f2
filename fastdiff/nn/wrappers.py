"""Unwrap networks from torch's wrappers, and recover the names of their parameters.

    wrapper                                     name of conv_in.weight in its state_dict
    torch.compile(model)                        _orig_mod.conv_in.weight
    DataParallel, DistributedDataParallel,      module.conv_in.weight
    AveragedModel

A part of a network may be compiled alone, so ``_orig_mod`` can be anywhere in a name. Files hold
the names of the bare network, whatever wrapped it in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# The attribute of torch.compile's wrapper that holds the network. The wrapper is recognised by it,
# since importing the wrapper's class would import the compiler.
COMPILED = "_orig_mod"
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def unwrapped(model: Any) -> Any:
    """The network inside any number of wrappers; anything else is returned as it is."""
    while isinstance(model, nn.Module):
        if COMPILED in model._modules:
            model = model._modules[COMPILED]
        elif isinstance(model, WRAPPERS):
            model = model.module
        else:
            break
    return model


def is_distributed(model: nn.Module) -> bool:
    """Whether DistributedDataParallel is among the wrappers.

    DistributedDataParallel makes gradients with the strides that the weights had when it was
    constructed. If the weights' memory format is changed later, a fused optimizer, which reads
    weights and gradients in memory order, silently updates them wrongly.
    """
    return any(isinstance(part, DistributedDataParallel) for part in model.modules())


def plain_name(name: str) -> str:
    """The name of a parameter of an unwrapped network, without the marks of compiled parts."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of the bare network, with the names of its own parameters."""
    return {plain_name(name): value for name, value in unwrapped(model).state_dict().items()}


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their :func:`plain_name`; older versions of fastdiff wrote other names."""
    return {plain_name(name): value for name, value in tensors.items()}
