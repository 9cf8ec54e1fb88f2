"""``torch.compile(model, backend="fastdiff")``: any U-Net's graph, fused for inference on a CPU.

Match -> fuse -> pack -> run: ``match`` finds convolutions and linear layers with their
surroundings in the graph that Dynamo hands over, ``rewrite`` puts one call of
``fastdiff.ops.conv2d`` in the place of each, ``packing`` keeps their weights in the form that the
kernels read, ``plan`` chooses an algorithm for each size. What is not recognised runs as it is.
"""

from __future__ import annotations

from fastdiff.compiler.backend import backend
from fastdiff.compiler.report import Explanation, explain

__all__ = ["Explanation", "backend", "explain"]
