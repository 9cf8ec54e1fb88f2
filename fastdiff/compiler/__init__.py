"""``torch.compile(model, backend="fastdiff")``: any U-Net's graph, fused for inference on a CPU.

The U-Nets of ``fastdiff.nn`` take the same way when they are sampled from, without torch.compile.

A residual block, as Dynamo hands it over (left out: parameters, which are inputs of the graph):

    group_norm = group_norm(x, 32, norm1.weight, norm1.bias, 1e-5)
    silu       = silu(group_norm)
    h          = conv2d(silu, conv1.weight, conv1.bias, (1, 1), (1, 1), (1, 1), 1)
    silu_1     = silu(temb)
    linear     = linear(silu_1, emb.weight, emb.bias)
    getitem    = getitem(linear, (:, :, None, None))
    h_1        = add(h, getitem)
    group_norm_1 = group_norm(h_1, 32, norm2.weight, norm2.bias, 1e-5)
    silu_2     = silu(group_norm_1)
    h_2        = conv2d(silu_2, conv2.weight, conv2.bias, (1, 1), (1, 1), (1, 1), 1)
    add        = add(x, h_2)

and as it is run:

    weights      = weights(conv1.weight, conv2.weight)         packed once, checked at every call
    statistics   = statistics_of(x)                            mean and variance of each channel
    coefficients = coefficients([statistics], 32, ...)         the norm as a gain and an offset
    silu         = silu(temb)
    linear       = linear(silu, emb.weight, emb.bias)
    conv2d       = conv2d(weights, x, bias, coefficients, linear)     norm, SiLU, conv, bias, emb
    y            = getitem(conv2d, 0)
    statistics_1 = getitem(conv2d, 1)                          taken while y was written
    coefficients_1 = coefficients([statistics_1], 32, ...)
    conv2d_1     = conv2d(weights, y, bias, coefficients_1, residual=x)
    restore      = restore(conv2d_1)                           the strides that eager mode gives

Neither a normalised nor an activated tensor is written to memory. Which folder does what:

    pipeline.py  the backend: decides which way a graph goes
    inference.py calls the stages in their order
    trace.py, network.py   the U-Nets of fastdiff.nn, whose graph needs no Dynamo
    graph/       nodes: what a node is; effects: what it writes, shares and draws; canonical: the
                 one spelling that matchers read; reshapes: where channels are after a view;
                 regions: graphs within the graph; edit: how a graph is changed
    match/       anchors: which nodes become one convolution; prologue: what it reads through;
                 epilogue: what it writes through; fused: the result, a Match; single_head:
                 attention with one head; patterns: what single nodes and norms compute
    choose/      plan: what is computed together, and by what; algorithms: which ones suit; timings:
                 how long each takes here; budget: memory
    rewrite/     fuse: matches replaced by calls; weights_node: what packs; gated: a * gelu(b);
                 composed: operations with gradients or for GPUs; strides: those that the caller
                 expects
    run/         calls: what the nodes call; packing: weights, never stale; recording and replay:
                 the calls as a list that C++ runs
    reasons.py, report.py, explanation.py   why a graph is not on the fast path, what became of it
    dynamo.py    what is asked of Dynamo beyond what it gives a backend

What is not recognised runs as it is. An algorithm is chosen by the clock: the first time that a
machine compiles a model, each size of its convolutions is computed a few times by each algorithm,
which takes seconds; the measurements are kept for later processes.

Environment:
    FASTDIFF_PLAN: ``measured``, the default, or ``heuristic``, which chooses by the sizes alone,
        so that results are the same bits in every process, and neither reads nor writes a file.
        For sampling in mode "auto", which needs no Dynamo, ``heuristic`` is the default.
    FASTDIFF_CACHE: the directory that measurements are kept in, by default ``fastdiff`` in
        XDG_CACHE_HOME or ``~/.cache``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.compiler.explanation import Explanation, explain
    from fastdiff.compiler.pipeline import backend

__all__ = ["Explanation", "backend", "explain"]

# Dynamo takes seconds to import, which those who sample with fastdiff's own U-Nets do not need.
_HOMES = {
    "Explanation": "explanation",
    "explain": "explanation",
    "backend": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdiff.compiler' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastdiff.compiler.{_HOMES[name]}"), name)


try:
    distribution("fastdiff")
except PackageNotFoundError:  # without its entry point Dynamo must be told of the backend
    importlib.import_module("fastdiff.compiler.pipeline")
