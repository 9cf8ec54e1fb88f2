"""What is learned of a forward process beside the network: the log-SNR of ``LearnedLogSNR``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.common.world import World
from fastdiff.objectives import Forward
from fastdiff.sde import LearnedLogSNR
from fastdiff.training import training_state
from fastdiff.training.adamw import AdamW
from fastdiff.training.training_options import TrainingOptions

_PREFIX = "process."  # of the names in a training state


class LearnedProcess:
    """The parameters of a process, and their optimizer; there are none for most processes.

    They are trained by AdamW with the options and the rate of the run, without weight decay, and by
    gradients of another loss than the network's (``losses.score_matching.diffusion_loss``), which
    are therefore not part of the gradient whose norm is clipped. They are not averaged: a network
    is told the log-SNR, and serves every process with the same ends.

    Args:
        forward: the process, whose parameters change in place.
        options: of the training.
        world: the processes of the run, which average the gradients.

    Attributes:
        parameters: float64, on the CPU.
    """

    def __init__(self, forward: Forward, options: TrainingOptions, world: World) -> None:
        self._forward, self._world = forward, world
        # Halved micro-batches are averaged with the network's gradients.
        self._averages = options.on_oom != "halve"
        self._named: list[tuple[str, nn.Parameter]] = []
        if isinstance(forward, LearnedLogSNR):
            self._named = list(forward.network.requires_grad_(True).named_parameters())
        self.parameters = [p for _, p in self._named]
        world.as_first(self.parameters)
        self._optimizer: AdamW | None = None
        if self.parameters:
            self._optimizer = AdamW(self.parameters, options.lr, options.betas, options.eps, 0.0)

    def now(self) -> Forward:
        """The process as it is now, which further training does not change."""
        if not self.parameters:
            return self._forward
        frozen = copy.deepcopy(self._forward)
        assert isinstance(frozen, LearnedLogSNR)
        frozen.network.requires_grad_(False)
        return frozen

    def gradient_is_finite(self) -> bool:
        """Whether the gradient of this step is; the processes average it here."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self._averages:
            self._world.average(gradients)
        return all(bool(gradient.isfinite().all()) for gradient in gradients)

    def update(self, rate: float) -> None:
        """Update the parameters by their gradients at a learning rate."""
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`restore` continues from, by names that no network's tensors have."""
        if self._optimizer is None:
            return {}
        tensors = training_state.state_tensors(self._named, self._optimizer)
        return {_PREFIX + name: value for name, value in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor], updates: int, path: Path) -> None:
        """Set parameters and moments to recorded ones; errors as ``training_state.restore``."""
        if self._optimizer is not None:
            own = {
                name.removeprefix(_PREFIX): value
                for name, value in tensors.items()
                if name.startswith(_PREFIX)
            }
            with torch.no_grad():
                training_state.restore(self._named, self._optimizer, own, updates, path)
