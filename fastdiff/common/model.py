"""What the library asks of a network: how it is called, and what it returns.

``Model`` is any callable. A network may offer more: one that ``Precomputing`` describes gives a
sampling loop its embeddings for all steps at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Model = Callable[..., Any]


class PrecomputedRows(Protocol):
    """What a network computes from timesteps and class labels before a sampling loop.

    Attributes:
        rows: [S, U, P], for each of S steps what is distinct in the batch.
        index: int64 [N], which of the U rows an image takes; None where they serve as they are.
        needs_time: the network must be given the timestep beside its row.
    """

    @property
    def rows(self) -> Tensor:
        """[S, U, P]."""

    @property
    def index(self) -> Tensor | None:
        """int64 [N], or None."""

    @property
    def needs_time(self) -> bool:
        """Whether the network reads the timestep too."""


class Precomputing(Protocol):
    """A network whose embeddings may be computed before a sampling loop, for all its steps."""

    def may_precompute(self) -> bool:
        """Whether skipping the embeddings' calls at every step cannot be told from outside."""

    def precompute(
        self, timesteps: Tensor, class_labels: Tensor | None = None, batch: int = 1
    ) -> PrecomputedRows:
        """What all the steps of a loop take from [S] timesteps and the labels of a batch."""


def precomputing(model: Any) -> Precomputing | None:
    """The network in ``model`` that allows its embeddings to be computed beforehand, or None.

    ``torch.compile`` around it changes nothing. Anything else around it sees every call, so that
    none may be skipped.
    """
    network = model
    if _is_compiled(model):
        if has_hooks(model) or not hasattr(model.forward, "_torchdynamo_orig_callable"):
            return None
        network = model._orig_mod
    offers = getattr(type(network), "may_precompute", None)
    return network if offers is not None and offers(network) else None


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether functions are registered that see the calls of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_compiled(model: Any) -> bool:
    """Whether it is what torch.compile makes of a module; without importing Dynamo."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and type(model) is dynamo.OptimizedModule


@dataclass(frozen=True)
class Output:
    """What the model must return: its shape, the images' dtype, and what to say of another shape.

    A model under autocast may return another dtype; it is cast.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    request: str

    def of(self, returned: Any) -> Tensor:
        """The prediction in what a model returned, cast; raises as :meth:`found` does."""
        out = self.found(returned)
        return out if out.dtype is self.dtype else out.to(self.dtype)

    def found(self, returned: Any) -> Tensor:
        """The prediction in what a model returned, in its own dtype.

        Raises:
            TypeError: there is none.
            ValueError: it has another shape.
        """
        out = returned
        if not isinstance(out, Tensor):
            out = out[0] if isinstance(out, tuple) and out else getattr(out, "sample", None)
            if not isinstance(out, Tensor):
                raise TypeError(
                    "the model must return a tensor, a tuple that begins with one, or an object "
                    f"with one named sample, got {type(returned).__name__}"
                )
        if out.shape != self.shape:
            raise ValueError(
                f"with {self.request} the model must return {self.shape}, got {tuple(out.shape)}"
            )
        return out
