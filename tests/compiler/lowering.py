"""What the tests of precisions, float16 and autocast share: casts of arguments, and errors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from judging import compiled, distance, settled
from models import cast, in_float64, inputs, make
from small import small_inputs, small_net
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.compiler import Explanation

OWN_CAST = ("guided", "improved")  # take and return float32 whatever their convolutions' dtype


def case(name: str, batch: int = 2) -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    """A float32 model, positional and keyword arguments."""
    if name == "small":
        return small_net(), small_inputs(batch), {}
    return make(name), *inputs(name, batch)


def case_in(name: str, dtype: torch.dtype) -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    """``case``, the model and its arguments converted to ``dtype``."""
    model, args, kwargs = case(name)
    if name in OWN_CAST:
        return cast(model, dtype), args, kwargs

    def convert(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return cast(model, dtype), *pytree.tree_map(convert, (args, kwargs))


def fused(told: Explanation) -> Counter[str]:
    """What is fused, but for the SiLU before linear layers and the statistics after a convolution.

    These stay outside where what they read or write has a dtype that the caller sees.
    """
    names = (row.what.replace(" + statistics", "") for row in told.fused)
    return Counter(name.removeprefix("silu + ") if "linear" in name else name for name in names)


def oracle(name: str) -> Tensor:
    """The result of the float32 model in float64."""
    return in_float64(*case(name))


def error(found: Tensor, name: str) -> float:
    """The largest error of a result, in units of the largest value."""
    return distance(found, oracle(name))


def run(name: str, dtype: torch.dtype, **options: str) -> tuple[Tensor, Tensor]:
    """What the compiled model in ``dtype`` returns, and what it returns in eager mode."""
    model, args, kwargs = case_in(name, dtype)
    found = settled(compiled(model, options=options), args, kwargs)
    return found, model(*args, **kwargs)
