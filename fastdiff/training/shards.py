"""A network in shards: of every weight, moment and average each process keeps a part of the rows.

PyTorch's ``fully_shard`` gathers the weights of a layer from all processes for the layer's calls,
and frees them again; gradients are added up and divided likewise (Rajbhandari et al. 2020, "ZeRO",
arXiv:1910.02054, stage 3; Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277). Of N processes each
keeps ceil(rows / N) consecutive rows of a tensor, the last ones fewer or none. Tensors of a single
number, such as gains, are whole in every process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.common.errors import InputError
from fastdiff.common.world import World
from fastdiff.nn import ImageNetwork
from fastdiff.nn.pretrained import NoInitialisation
from fastdiff.nn.wrappers import plain_name
from fastdiff.training.training_options import TrainingOptions


class Shards:
    """Divides a network among processes, in place.

    The network can then be called, by all processes at once, and trained. Methods that gather or
    add up must be called by all processes, in the same order.

    Args:
        network: with contiguous weights, which are the same in all processes.
        world: the processes, several.

    Attributes:
        named: this process's part of each parameter, plain tensors that share the memory of the
            network's, with the parameters' names in files. Their ``grad`` is set by
            :meth:`take_gradients`.
    """

    def __init__(self, network: ImageNetwork, world: World) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # which others need not import

        self._world, self._class, self._network = world, type(network), network
        self._device: torch.device = next(network.parameters()).device
        self._shapes = {plain_name(name): p.shape for name, p in network.named_parameters()}
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self._device.type, (world.count,)),
            "ignored_params": {p for p in network.parameters() if not p.ndim},
        }
        embeddings = [
            part for part in network.of_embeddings() if any(True for _ in part.parameters())
        ]
        # All of the embeddings are computed at the beginning of a call, those inside blocks too.
        fully_shard(embeddings, **options)
        for layer in _units(network, embeddings):
            fully_shard(layer, **options)
        fully_shard(network, **options)
        self._whole = list(network.parameters())
        with torch.no_grad():
            self.named = [(plain_name(name), _local(p)) for name, p in network.named_parameters()]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """This process's part of each parameter."""
        return [p for _, p in self.named]

    def exchange(self, now: bool) -> None:
        """Whether the next backward passes add up and divide the gradients of all processes.

        Without it a process keeps its own whole gradients, to which the next ones are added.
        """
        self._network.set_requires_gradient_sync(now)  # type: ignore[operator]  # fully_shard's

    @torch.no_grad()
    def take_gradients(self) -> None:
        """After a backward pass, give the parts their gradients, the means over the processes."""
        for (_, part), p in zip(self.named, self._whole, strict=True):
            if part is not p:
                part.grad = None if p.grad is None else p.grad.to_local()  # type: ignore[attr-defined]
        self._world.average([p.grad for p in self._whole if not p.ndim and p.grad is not None])

    def gradient_norm(self) -> float:
        """The norm of the whole gradient."""
        counted = [p for p in self.parameters if p.ndim or self._world.first]
        own = ops.gradient_norm([p.grad for p in counted if p.grad is not None])
        squares = self._world.joined(own.double().square().reshape(1), self._world.count)
        return float(squares.sum().sqrt())

    def part(self, key: str, value: Tensor) -> Tensor:
        """This process's part of a whole tensor; a view. Others are left as they are.

        Args:
            key: the name of the parameter, perhaps with what is kept of it before it and a point.
            value: the parameter, or something like it.
        """
        shape = self._shape(key)
        if shape is None or not value.ndim or value.shape != shape:
            return value
        rows = self._rows(shape)
        return value[self._world.rank * rows : (self._world.rank + 1) * rows]

    @torch.no_grad()
    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of parts, on the CPU of the first process; nothing in the others.

        They are gathered one after another, so that no other process has more than a part of any.

        Args:
            tensors: parts by keys as those of :meth:`part`, the same keys in all processes.
        """
        found: dict[str, Tensor] = {}
        for key, value in tensors.items():
            shape = self._shape(key)
            assert shape is not None, key
            whole = self._gathered(value, shape) if value.ndim else value.detach().cpu()
            if whole is not None and self._world.first:
                found[key] = whole
        return found

    def network(self, values: Iterable[Tensor]) -> ImageNetwork:
        """A whole network in eval mode with gathered weights in the first process.

        In the others it is without memory, on the device "meta".

        Args:
            values: this process's part of each weight, in the order of the parameters.
        """
        state = self.gathered(dict(zip(self._shapes, values, strict=True)))
        if self._world.first:
            found = self._class.from_weights(self._network.config, state).to(self._device)
        else:
            with torch.device("meta"), NoInitialisation():
                found = self._class(**self._network.config.to_dict())
        return found.eval().requires_grad_(False)

    def _gathered(self, part: Tensor, shape: torch.Size) -> Tensor | None:
        padded = part.new_zeros(self._rows(shape), *shape[1:])  # a collective wants one size
        padded[: len(part)] = part
        parts = None
        if self._world.first:
            parts = [torch.empty_like(padded) for _ in range(self._world.count)]
        with self._world.lost_as_errors():
            dist.gather(padded, parts)
        return None if parts is None else torch.cat([p.cpu() for p in parts])[: shape[0]]

    def _shape(self, key: str) -> torch.Size | None:
        """The shape of a whole parameter, None for the name of something else."""
        name = key if key in self._shapes else key.partition(".")[2]
        return self._shapes.get(name)

    def _rows(self, shape: torch.Size) -> int:
        """How many rows of a tensor a process keeps, at most."""
        return -(-shape[0] // self._world.count)


def divided(
    model: nn.Module, network: ImageNetwork, options: TrainingOptions, world: World
) -> Shards | None:
    """The network of a run in shards if its options want that, else None.

    It warns of options that have no effect then.

    Args:
        model: what was given to train.
        network: it without wrappers.
        options: of the run.
        world: its processes.

    Raises:
        InputError: there is one process, the model is in a wrapper or compiled, or its weights are
            not plain.
    """
    if not options.shard:
        return None
    if world.count == 1:
        raise InputError(
            "shard divides the weights among processes, and this is the only one: start several by "
            "torchrun, or train without shard"
        )
    if model is not network or network._compiled_call_impl is not None:
        raise InputError(
            f"shard wants the bare network, neither compiled nor in a wrapper, got {_kind(model)}"
        )
    strange = {type(p).__name__ for p in network.parameters()} - {"Parameter"}
    if strange:
        raise InputError(f"shard wants weights that are plain parameters, got {min(strange)}")
    if world.first:
        _warn(options)
    return Shards(network, world)


def gradient_norm(parameters: Sequence[nn.Parameter], shards: Shards | None) -> float:
    """The norm of the gradient of a network's parameters, which are whole or in shards."""
    if shards is not None:
        return shards.gradient_norm()
    return float(ops.gradient_norm([p.grad for p in parameters if p.grad is not None]))


def _warn(options: TrainingOptions) -> None:
    """Say what has no effect."""
    off = []
    if options.compile and not options.gradient_checkpointing:
        off.append("the fused graph of compile is off, since it reads weights without these calls")
    if options.channels_last:
        off.append("weights are not in channels_last format, which cannot be divided; images are")
    if off:
        warnings.warn(
            "fastdiff: with shard, a layer's weights are whole only during its calls: "
            + "; ".join(off),
            stacklevel=4,
        )


def _kind(model: nn.Module) -> str:
    compiled = model._compiled_call_impl is not None
    return f"a compiled {type(model).__name__}" if compiled else type(model).__name__


def _units(network: nn.Module, embeddings: list[nn.Module]) -> list[nn.Module]:
    """The layers whose weights are gathered together: all with parts, but the embeddings.

    They are the layers of blocks, rather than blocks, since what is gathered is there several times
    for a moment, on its way and as weights.
    """
    parts = [
        p for p in network.children() if p not in embeddings and any(True for _ in p.children())
    ]
    units = [unit for part in parts for unit in _inside(part)]
    return [unit for unit in units if any(True for _ in unit.parameters())]


def _inside(part: nn.Module) -> list[nn.Module]:
    """The items of a list, or of a part that is nothing but lists; else the part."""
    children = list(part.children())
    lists = bool(children) and all(isinstance(child, nn.ModuleList) for child in children)
    if lists or isinstance(part, nn.ModuleList):
        return [unit for child in children for unit in _inside(child)]
    return [part]


def _local(p: nn.Parameter) -> nn.Parameter:
    """What this process keeps of a parameter; the parameter itself if that is all of it."""
    if not p.ndim:
        return p
    return nn.Parameter(p.to_local(), p.requires_grad)  # type: ignore[attr-defined]
