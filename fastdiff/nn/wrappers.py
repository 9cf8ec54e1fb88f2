"""Networks inside what torch puts around them, and their parameters' own names.

    wrapper                                     name of conv_in.weight in its state_dict
    torch.compile(model)                        _orig_mod.conv_in.weight
    DataParallel, DistributedDataParallel,      module.conv_in.weight
    AveragedModel

A part of a network may be compiled alone, so ``_orig_mod`` can stand anywhere in a name. What is
written to a file bears the names of the bare network, whatever was around it in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

COMPILED = "_orig_mod"  # the attribute of torch.compile's wrapper; its class imports the compiler
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def unwrapped(model: Any) -> Any:
    """The network itself, from under any number of wrappers; what is no wrapper comes back."""
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

    It gives the weights gradients of the strides that the weights had when it was made. Weights
    whose memory format is changed later would be updated wrongly, without a word, by a fused
    optimizer, which reads both in the order of memory.
    """
    return any(isinstance(part, DistributedDataParallel) for part in model.modules())


def plain_name(name: str) -> str:
    """The name of a parameter of an unwrapped network as if no part of it were compiled."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of the bare network, under its own names."""
    return {plain_name(name): value for name, value in unwrapped(model).state_dict().items()}


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under :func:`plain_name`: versions of fastdiff have written others to files."""
    return {plain_name(name): value for name, value in tensors.items()}
