"""Why a graph is not on the fast path, and what its user can do about it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastdiff.compiler.graph.effects import (
    changes_autocast,
    changes_modes,
    functional_argument,
    is_active_dropout,
    name_of,
)
from fastdiff.compiler.match.patterns import FUSED_DTYPES


@dataclass(frozen=True)
class Reason:
    """Why a graph is not on the fast path.

    Attributes:
        text: the reason.
        advice: what the user can do; None where nothing is wrong.
        untouched: whether the graph must stay as it is, without any operation of fastdiff.
    """

    text: str
    advice: str | None = None
    untouched: bool = False


MODE_CHANGE = Reason(
    "within the graph, gradients or vmap are switched on or off",
    "Switch them around the call of the compiled model",
    untouched=True,
)
SUBCLASS = Reason(
    "a tensor is of a class of its own, as quantised or distributed weights are",
    "Compile the model with plain tensors, or with another backend",
    untouched=True,
)
FORWARD = Reason("forward-mode differentiation is on", untouched=True)
EMPTY = Reason("an empty tensor")


def wants_gradients(values: list[Tensor]) -> bool:
    """Whether a graph with such values may be differentiated."""
    return torch.is_grad_enabled() and any(v.requires_grad for v in values)


def why_slow(gm: GraphModule, values: list[Tensor], devices: list[str]) -> Reason | None:
    """Why a graph cannot take the fast path; None if it can.

    Args:
        gm: the graph.
        values: examples of all its tensors.
        devices: the sorted types of the devices of ``values``, each once.
    """
    if devices == ["cuda"] or not devices:
        return Reason(
            f"tensors on {', '.join(devices) or 'no device'}: Inductor compiles CUDA graphs",
            untouched=not devices,
        )
    autocast = torch.is_autocast_enabled("cpu") or changes_autocast(gm.graph)
    reason = _special(gm, values, devices) or _ordinary(gm, values)
    if reason is None:
        return None
    advice = None if wants_gradients(values) else reason.advice
    # Without the fast path autocast stays the model's own affair.
    return replace(reason, advice=advice, untouched=reason.untouched or autocast)


def _ordinary(gm: GraphModule, values: list[Tensor]) -> Reason | None:
    """A reason in what the graph computes and in its dtypes; else None."""
    if any(isinstance(size, int) and size == 0 for v in values for size in v.shape):
        return EMPTY
    gradients = wants_gradients(values)
    random = next((n for n in gm.graph.nodes if _is_training(n)), None)
    if random is not None and not gradients:
        name = random.target if random.op == "call_method" else name_of(random)
        return Reason(f"training mode: {name}", "Call model.eval() before sampling")
    floats = {v.dtype for v in values if v.dtype.is_floating_point}
    if not floats:
        return Reason("no tensor of floating point")
    wanted = "float32 or bfloat16" if gradients else "float32, bfloat16 or float16"
    if not floats & {*FUSED_DTYPES, *(() if gradients else (torch.float16,))}:
        names = ", ".join(sorted(str(d) for d in floats))
        return Reason(
            f"dtype {names}, wanted {wanted}",
            "Convert the model and its inputs, by model.float() or model.to(torch.bfloat16)",
        )
    return None


def _special(gm: GraphModule, values: list[Tensor], devices: list[str]) -> Reason | None:
    """A reason in the kind of the tensors and the modes around them; else None."""
    if devices != ["cpu"]:
        return Reason(
            f"tensors on {', '.join(devices)}",
            "Put the model and all its inputs on a CPU, or all of them on a CUDA device",
            untouched=True,
        )
    if any(is_traceable_wrapper_subclass(v) for v in values):
        return SUBCLASS
    if forward_ad._current_level >= 0:  # fused operations have no forward-mode derivative
        return FORWARD
    return MODE_CHANGE if changes_modes(gm.graph) else None


def _is_training(node: Node) -> bool:
    norm = name_of(node) in ("batch_norm", "instance_norm")
    return is_active_dropout(node) or (
        norm and functional_argument(node, "training", 5, False) is True
    )
