"""The quickest way to call a model that gives what its own call gives."""

from __future__ import annotations

from typing import Any

from fastdiff.common.model import Layered, Model, layered
from fastdiff.ops.backend import kernel_runs


def quick(model: Model) -> Model:
    """``model``, or what calls a fused graph of its layers (``fastdiff.compiler.network``).

    The latter for a ``fastdiff.nn.UNet2DModel`` in eval mode on a CPU of which nothing was changed:
    no hooks, subclasses or foreign parts. Values agree to the compiler's accuracy.
    """
    network = _fusible(model)
    if network is None:
        return model
    from fastdiff.compiler.network import FusedNetwork  # which others need not import

    return FusedNetwork(network)


def is_compiled(model: Any) -> bool:
    """Whether ``quick`` gives a fused graph, with the backend as it is now."""
    return _fusible(model) is not None


def _fusible(model: Any) -> Layered | None:
    network = layered(model)
    runs = network is not None and kernel_runs(next(iter(network.parameters())))
    return network if runs else None
