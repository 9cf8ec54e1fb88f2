"""How compiled models are judged: shapes and strides by eager PyTorch, errors against float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import in_float64
from torch import Tensor, nn
from torch.utils import _pytree as pytree

FAST = 1e-4  # of an output's scale: what float32 may cost with Winograd's transforms
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def compiled(model: Any, **options: Any) -> Any:
    """The model, compiled; a graph break is an error."""
    return torch.compile(model, backend="fastdiff", fullgraph=True, **options)


def settled(net: Any, args: Any, kwargs: Any | None = None) -> Any:
    """What the third call gives, which is run from a list where it can be (``compiler.replay``)."""
    first, second, third = (net(*args, **(kwargs or {})) for _ in range(3))
    for later in (second, third):
        for a, b in zip(pytree.tree_leaves(first), pytree.tree_leaves(later), strict=True):
            assert torch.equal(a, b)
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
    return third


def assert_changes_are_seen(net: Any, model: nn.Module, args: Any, dtype: torch.dtype) -> None:
    """Nothing but the caller changes a parameter of ``dtype``, and each such change shows."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    last = settled(net, args)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, before[name])
        if name == "k.bias":
            continue  # softmax does not see it
        parameter.data.mul_(-1.5)
        found = net(*args)
        assert (found - last).abs().max() > 1e-3, name
        last = found


def assert_as_eager(
    found: Any,
    model: nn.Module,
    args: Any,
    kwargs: Any | None = None,
    *,
    precision: str = "fast",
) -> None:
    """Hold what the compiled model returned to what the model itself returns for the arguments.

    Shapes, dtypes and strides (or Dynamo's) are eager's. The error against float64, in units of the
    largest value of an output, may be four units in the last place of bfloat16, or eight of float32
    (with ``fast`` precision 1e-4), and twice what moving each weight and argument by a unit of
    float32 does to the output, which counts where means are large beside deviations. PyTorch's own
    error is no part of it: it differs from one processor to another.
    """
    kwargs = kwargs or {}
    with torch.no_grad():
        eager = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    oracle = in_float64(model, args, kwargs)
    outputs = zip(*map(pytree.tree_leaves, (found, eager, oracle)), strict=True)
    for index, (a, b, c) in enumerate(outputs):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), index
        if a.stride() != b.stride():
            wanted = predicted_strides(model, args, kwargs)[index]
            assert a.stride() == wanted, (index, a.stride(), b.stride(), wanted)
        dtype = narrowest(model, a)
        allowed = (4 if dtype == torch.bfloat16 else 8) * torch.finfo(dtype).eps
        if precision == "fast":
            allowed = max(allowed, FAST)
        error = distance(a, c)
        if error > allowed:
            allowed += 2 * distance(moved_outputs(model, args, kwargs)[index], c)
        assert error <= allowed, (
            f"output {index}: error {error:.3g} of the scale, not {allowed:.3g}"
        )


def moved_outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """The outputs where each weight and argument is a unit of float32 more or less."""
    g = torch.Generator().manual_seed(0)
    return pytree.tree_leaves(in_float64(model, args, kwargs, moved_by=g))


def predicted_strides(model: nn.Module, args: Any, kwargs: Any) -> list[tuple[int, ...]]:
    """Those that Dynamo expects of the outputs, which every backend gives.

    PyTorch's kernels and its rules for their results disagree in places, as on what follows a view
    of batch 1, so that eager has others.
    """
    found: list[tuple[int, ...]] = []

    def note(gm: torch.fx.GraphModule, _: Any) -> Any:
        outputs = next(node for node in gm.graph.nodes if node.op == "output").args[0]
        found.extend(tuple(node.meta["example_value"].stride()) for node in outputs)
        return gm.forward

    with torch.no_grad():
        torch._dynamo.reset()
        args, kwargs = copy.deepcopy((args, kwargs))
        torch.compile(model, backend=note, fullgraph=True, dynamic=False)(*args, **kwargs)
    return found


def narrowest(model: nn.Module, output: Tensor) -> torch.dtype:
    """The dtype with the fewest digits among the output's and the weights'."""
    dtypes = {output.dtype, *(parameter.dtype for parameter in model.parameters())}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def distance(a: Tensor, oracle: Tensor) -> float:
    """The largest difference, in units of the oracle's largest value."""
    if not a.numel():
        return 0.0
    assert bool(torch.isfinite(a).all())
    return ((a.double() - oracle).abs().max() / oracle.abs().max().clamp_min(1e-12)).item()


def graphs() -> int:
    """How many graphs Dynamo has made in this test."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
