"""The running averages of a model's weights that a training run keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.nn import ImageNetwork
from fastdiff.nn.wrappers import plain_name, plain_state
from fastdiff.training import power_function
from fastdiff.training.session import ema_decay
from fastdiff.training.shards import Shards
from fastdiff.training.training_options import TrainingOptions

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Exponential:
    """An exponential moving average.

    Attributes:
        decay: its decay after the first steps, see ``fastdiff.training.session.ema_decay``.
    """

    decay: float

    @property
    def name(self) -> str:
        """The name of its weights, as ``ema-0.999``."""
        return f"ema-{self.decay!r}"

    def weight(self, step: int) -> float:
        """How far it moves to the weights after step ``step``, counted from 0."""
        return 1 - ema_decay(self.decay, step)


@dataclass(frozen=True)
class Power:
    """A power function's average, see ``fastdiff.training.power_function``.

    Attributes:
        std: the standard deviation of its profile relative to the steps so far.
    """

    std: float

    @property
    def name(self) -> str:
        """The name of its weights, as ``std-0.05``."""
        return f"std-{self.std!r}"

    @cached_property
    def _gamma(self) -> float:
        return power_function.exponent(self.std)

    def weight(self, step: int) -> float:
        """How far it moves to the weights after step ``step``, counted from 0."""
        return power_function.weight(self._gamma, step)


Profile = Exponential | Power


def profiles(options: TrainingOptions) -> list[Profile]:
    """The averages that a run keeps, in order; the first is that of its checkpoints' model."""
    return [*map(Exponential, options.decays), *map(Power, options.ema_std)]


class Averages:
    """The averages of a network's weights.

    Args:
        network: whose parameters are averaged.
        options: for the averages to keep.
        shards: of the network, whose averages are then in shards too; None if it is whole. What
            gathers shards must be called by all processes.

    Attributes:
        profiles: of the averages.
        sets: the averages, each a tensor for each parameter, like what this process keeps of it.
    """

    def __init__(
        self, network: ImageNetwork, options: TrainingOptions, shards: Shards | None = None
    ) -> None:
        self.profiles, self._shards = profiles(options), shards
        self._names = [plain_name(name) for name, _ in network.named_parameters()]
        self._network: ImageNetwork | None = None
        if shards is None:
            self._network = copy.deepcopy(network).eval().requires_grad_(False)
            first: list[Tensor] = list(self._network.parameters())
        else:
            first = [p.detach().clone() for p in shards.parameters]
        others = self.profiles[1:]
        self.sets: list[list[Tensor]] = [
            [*first],
            *([torch.clone(p) for p in first] for _ in others),
        ]

    @property
    def network(self) -> ImageNetwork:
        """The network in eval mode, whose weights are the first average.

        Of shards it is a copy, whole in the first process, see ``Shards.network``.
        """
        if self._shards is not None:
            return self._shards.network(self.first)
        assert self._network is not None
        return self._network

    @property
    def first(self) -> list[Tensor]:
        """The average of the checkpoints' model, a tensor for each parameter."""
        return self.sets[0]

    def first_weight(self, step: int) -> float:
        """How far the first average moves after step ``step``, counted from 0."""
        return self.profiles[0].weight(step)

    def move_others(self, parameters: list[nn.Parameter], step: int) -> None:
        """Move all averages but the first towards the parameters after step ``step``.

        The first is moved in the pass over the weights in which the optimizer changes them.
        """
        for profile, values in zip(self.profiles[1:], self.sets[1:], strict=True):
            ops.ema_update(values, parameters, profile.weight(step))

    def other_states(self) -> dict[str, dict[str, Tensor]]:
        """The weights of all averages but the first, by the average's name."""
        return {profile.name: self.state(profile.name) for profile in self.profiles[1:]}

    def power_states(self) -> dict[float, dict[str, Tensor]]:
        """The weights of the averages by a power function, by its relative standard deviation."""
        powers = [profile for profile in self.profiles if isinstance(profile, Power)]
        return {profile.std: self.state(profile.name) for profile in powers}

    def state(self, name: str) -> dict[str, Tensor]:
        """The network's state with the weights of an average.

        Of shards it is a copy, whole in the first process, and empty in the others.
        """
        kept = self._kept(name)
        return kept if self._shards is None else self._shards.gathered(kept)

    def _kept(self, name: str) -> dict[str, Tensor]:
        """What this process keeps of the network's state with the weights of an average."""
        values = self.sets[[profile.name for profile in self.profiles].index(name)]
        others = {} if self._network is None else plain_state(self._network)
        return {**others, **dict(zip(self._names, values, strict=True))}

    @torch.no_grad()
    def restore(self, states: Mapping[str, State]) -> None:
        """Set all averages to recorded weights, by the averages' names.

        Raises:
            KeyError: an average or a weight is missing.
        """
        for profile in self.profiles:
            for name, target in self._kept(profile.name).items():
                value = states[profile.name][name]
                target.copy_(value if self._shards is None else self._shards.part(name, value))
