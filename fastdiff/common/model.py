"""What the library requires of a network: how it is called, and what it returns.

``Model`` is any callable. A network with the methods of ``Precomputing`` can also give a sampling
loop its embeddings for all steps at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

Model = Callable[..., Any]


class PrecomputedRows(Protocol):
    """Embeddings that a network computes from timesteps and class labels before a sampling loop.

    Attributes:
        rows: [S, U, P]: for each of S steps the U distinct rows of the batch.
        index: int64 [N], which of the U rows each image takes; None if there is one row for the
            whole batch, or one for each image in order.
        needs_time: whether the network must be given the timestep together with its row.
    """

    @property
    def rows(self) -> Tensor:
        """[S, U, P]."""

    @property
    def index(self) -> Tensor | None:
        """int64 [N], or None."""

    @property
    def needs_time(self) -> bool:
        """Whether the network must be given the timestep too."""


class Precomputing(Protocol):
    """A network whose embeddings may be computed before a sampling loop, for all its steps."""

    def may_precompute(self) -> bool:
        """Whether a loop that skips the embeddings' calls behaves like one that makes them."""

    def precompute(
        self, timesteps: Tensor, class_labels: Tensor | None = None, batch: int = 1
    ) -> PrecomputedRows:
        """The embeddings of timesteps [S] and of the labels of a batch, for all steps."""


class Layered(Precomputing, Protocol):
    """A network that is embeddings, and layers that take rows of them with the images."""

    training: bool

    def may_fuse(self) -> bool:
        """Whether it cannot be told from outside that a graph of the layers is called instead."""

    def layers(self, x: Tensor, rows: Tensor) -> Tensor:
        """The layers, of samples [N, C, ...] and a step of :meth:`precompute`, [N or 1, P]."""

    def through(
        self, layers: Callable[[Tensor, Tensor], Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """What the network gives for these arguments, its layers computed by ``layers``."""

    def named_parameters(self, *, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
        """As that of ``nn.Module``."""

    def parameters(self) -> Iterator[Any]:
        """Likewise."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's output."""


def layered(model: Any, *, training: bool = False) -> Layered | None:
    """The network that a model is, if a graph of its layers may be called instead, or None.

    ``torch.optim.swa_utils.AveragedModel`` around it, as an average of weights is kept in,
    changes nothing.

    Args:
        model: anything.
        training: the mode in which the network must be.
    """
    network = model
    if type(model) is AveragedModel:
        if has_hooks(model) or "forward" in vars(model):
            return None
        network = model.module
    may = getattr(type(network), "may_fuse", None)
    fits = may is not None and network.training == training and may(network)
    return network if fits else None


def precomputing(model: Any) -> Precomputing | None:
    """The network in ``model`` if its embeddings may be computed before a loop, else None.

    The network may be compiled by ``torch.compile``. Any other wrapper could observe each call of
    the network, so for a wrapped network the result is None.
    """
    network = model
    if _is_compiled(model):
        if has_hooks(model) or not hasattr(model.forward, "_torchdynamo_orig_callable"):
            return None
        network = model._orig_mod
    offers = getattr(type(network), "may_precompute", None)
    return network if offers is not None and offers(network) else None


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks are registered on a module's calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_compiled(model: Any) -> bool:
    """Whether ``model`` is the result of torch.compile for a module; does not import Dynamo."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and type(model) is dynamo.OptimizedModule


@dataclass(frozen=True)
class Output:
    """The shape and dtype that a model must return.

    A model under autocast may return another dtype, which :meth:`of` casts.

    Attributes:
        shape: of the prediction.
        dtype: of the images.
        request: what the shape follows from, for the error: "with REQUEST the model must return".
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    request: str

    def of(self, returned: Any) -> Tensor:
        """The prediction in what a model returned, cast to the images' dtype.

        Raises:
            TypeError, ValueError: as :meth:`checked` does.
        """
        out = self.checked(returned)
        return out if out.dtype is self.dtype else out.to(self.dtype)

    def checked(self, returned: Any) -> Tensor:
        """The prediction in what a model returned, in its own dtype.

        Args:
            returned: a tensor, a tuple that begins with one, or an object with one named sample.

        Raises:
            TypeError: ``returned`` is none of these.
            ValueError: the prediction has another shape.
        """
        out = tensor_of(returned)
        if out.shape != self.shape:
            raise ValueError(
                f"with {self.request} the model must return {self.shape}, got {tuple(out.shape)}"
            )
        return out


def tensor_of(returned: Any) -> Tensor:
    """The tensor in what a model returned: itself, the first of a tuple, or the one named sample.

    Raises:
        TypeError: ``returned`` is none of these.
    """
    out = returned
    if not isinstance(out, Tensor):
        out = out[0] if isinstance(out, tuple) and out else getattr(out, "sample", None)
    if not isinstance(out, Tensor):
        raise TypeError(
            "the model must return a tensor, a tuple that begins with one, or an object "
            f"with one named sample, got {type(returned).__name__}"
        )
    return out


class KeepsValues(Protocol):
    """A model that keeps values from one of its calls to the next, within one run of a sampler."""

    def begin_sampling(self) -> None:
        """Forget what was kept: a run begins, or the next slice of a large batch."""


def keeping(model: Any) -> list[KeepsValues]:
    """The parts of a model that keep values: the model itself, and modules inside it."""
    parts: Any = model.modules() if isinstance(model, torch.nn.Module) else (model,)
    return [part for part in parts if callable(getattr(part, "begin_sampling", None))]
