"""``torch.compile(model, backend="fastdiff")``: any U-Net's graph, fused on a CPU.

The U-Nets of ``fastdiff.nn`` take the same way when they are sampled from, and when the trainer
trains them, without torch.compile.

A residual block as Dynamo hands it over (its parameters, inputs of the graph, are not shown):

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

and as it runs:

    weights      = weights(conv1.weight, conv2.weight)         packed once, checked at every call
    statistics   = statistics_of(x)                            mean and variance of each channel
    coefficients = coefficients([statistics], 32, ...)         the norm as a gain and an offset
    silu         = silu(temb)
    linear       = linear(silu, emb.weight, emb.bias)
    conv2d       = conv2d(weights, x, bias, coefficients, linear)     norm, SiLU, conv, bias, emb
    y            = getitem(conv2d, 0)
    statistics_1 = getitem(conv2d, 1)                          collected while y was written
    coefficients_1 = coefficients([statistics_1], 32, ...)
    conv2d_1     = conv2d(weights, y, bias, coefficients_1, residual=x)
    restore      = restore(conv2d_1)                           the strides of eager mode

Neither a normalised nor an activated tensor is written to memory. With gradients each call is
``ops.norm_conv2d``, which packs the weight itself and can be differentiated. The files:

    pipeline.py  the backend: decides how a graph is compiled
    inference.py, training.py   call the stages in their order, without gradients and with them
    trace.py, network.py   the graphs of the U-Nets of fastdiff.nn, made without Dynamo
    graph/       nodes: a node's operation, arguments and value; dtypes: which operations compute in
                 any dtype; effects: what it writes, whether it
                 shares memory or uses random numbers; canonical: the form that matchers read;
                 reshapes: the channel dimension after a view; regions: graphs within the graph;
                 edit: insert, replace and remove nodes
    match/       anchors: the matches of a graph; fused: a Match, one fused convolution; prologue,
                 epilogue: what is fused before and after the convolution; single_head: attention
                 with one head; patterns: patterns of single nodes and of norms
    choose/      plan: which matches are computed together; algorithms: the algorithm of each;
                 gradients: those of training, by sizes alone; sizes, measuring, timings: measured
                 times; budget: memory for packed weights
    rewrite/     fuse, fuse_training: replace matches by calls, as an emitter does that both share;
                 weights_node: the call that packs the weights;
                 autocast: autocast's conversions as nodes; lower: computes in another dtype;
                 computed: weights that are computed from parameters alone, as normalised ones;
                 low_rank: adds LoRA's products to the weights that they adapt;
                 gated: a * gelu(b); composed: operations with gradients or for GPUs; strides:
                 restores the strides that the caller expects
    run/         calls, trained: the functions that the nodes call; forms: activations as images;
                 packing: weights, packed again when they change; adapted_weights: those that LoRA
                 adapts; computed_weights: those that are computed; recording and replay: the
                 calls as a list that C++ runs
    reasons.py, report.py, explanation.py   why a graph is not on the fast path; what was fused
    dynamo.py    private interfaces of Dynamo

Nodes that are not recognised run unchanged. Algorithms are chosen by measured times: the first time
that a machine compiles a model, each algorithm computes each size of its convolutions a few times,
which takes seconds. The measurements are kept for later processes.

Environment:
    FASTDIFF_PLAN: ``measured``, the default, or ``heuristic``: algorithms are chosen by the sizes
        alone, results are bitwise the same in every process, and no file is read or written.
        It is the default for sampling in mode "auto", which needs no Dynamo.
    FASTDIFF_CACHE: the directory of the measurements, in which a leading ``~`` is the home
        directory; by default ``fastdiff`` in XDG_CACHE_HOME or ``~/.cache``.
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
