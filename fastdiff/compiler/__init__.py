"""``torch.compile(model, backend="fastdiff")``: any U-Net's graph, fused for inference on a CPU.

Match -> fuse -> pack -> run: ``match`` finds convolutions and linear layers with their
surroundings in the graph that Dynamo hands over, ``rewrite`` puts one call of
``fastdiff.ops.conv2d`` in the place of each, ``packing`` keeps their weights in the form that the
kernels read, ``plan`` chooses an algorithm for each size. What is not recognised runs as it is.

The choice is by the clock: the first time that a machine compiles a model, each size of its
convolutions is computed a few times by each algorithm, which takes seconds; the measurements are
kept for later processes.

Environment:
    FASTDIFF_PLAN: ``measured``, the default, or ``heuristic``, which chooses by the sizes alone,
        so that results are the same bits in every process, and neither reads nor writes a file.
    FASTDIFF_CACHE: the directory that measurements are kept in, by default ``fastdiff`` in
        XDG_CACHE_HOME or ``~/.cache``.
"""

from __future__ import annotations

from fastdiff.compiler.explain import Explanation, explain
from fastdiff.compiler.pipeline import backend

__all__ = ["Explanation", "backend", "explain"]
