"""The optimizers of a training run, whose step also clips the gradient and averages the weights.

AdamW is ``fastdiff.training.adamw``, the others are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.training.adamw import AdamW, scale_gradients
from fastdiff.training.training_options import TrainingOptions

Named = Sequence[tuple[str, nn.Parameter]]

# Parts of a U-Net whose weights Muon leaves to AdamW: those that read or write images, and the
# table of the classes. A step of Muon is as large in all directions, which suits hidden layers.
NOT_HIDDEN = ("conv_in", "conv_out", "class_embedding")
MOMENTUM = {"sgd": 0.9, "muon": 0.95}  # unless the options say otherwise


class _Averaging(torch.optim.Optimizer):
    """Gives an optimizer of PyTorch the step of ``fastdiff.training.adamw.AdamW``."""

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        gradient_factor: float = 1.0,
        averages: Sequence[Tensor] = (),
        average_weight: float = 0.0,
    ) -> Any:
        """Update the parameters, then move their averages; see ``AdamW.step``."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        scale_gradients(parameters, gradient_factor)
        result = super().step(closure)
        ops.ema_update(averages, parameters if averages else [], average_weight)
        return result


class Adam(_Averaging, torch.optim.Adam):
    """``torch.optim.Adam``, whose weight decay is part of the gradient."""


class SGD(_Averaging, torch.optim.SGD):
    """``torch.optim.SGD``."""


class Muon:
    """``torch.optim.Muon`` for the weights of hidden layers, and AdamW for all others.

    Muon makes the momentum of a matrix orthogonal (Jordan et al. 2024, "Muon: an optimizer for
    hidden layers in neural networks"). The weight of a convolution [O, I, H, W] is taken as a
    matrix of O rows. The size of a step is scaled to that of AdamW (Liu et al. 2025,
    arXiv:2502.16982, section 2.2), so that both take one learning rate and one weight decay.

    Args:
        parameters: with their names in the network.
        lr: learning rate.
        momentum: of the matrices; it is Nesterov's.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled weight decay.
    """

    def __init__(
        self,
        parameters: Named,
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.parameters = [p for _, p in parameters]
        hidden = [
            p for name, p in parameters if p.ndim >= 2 and name.split(".")[0] not in NOT_HIDDEN
        ]
        # Parameters that share the memory of the weights.
        self.matrices = {p: nn.Parameter(as_matrix(p.detach(), p)) for p in hidden}
        others = [p for p in self.parameters if p not in self.matrices]
        self.adamw = AdamW(others, lr, betas, eps, weight_decay)
        self.muon = torch.optim.Muon(
            [*self.matrices.values()], lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both optimizers."""
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def step(
        self,
        *,
        gradient_factor: float = 1.0,
        averages: Sequence[Tensor] = (),
        average_weight: float = 0.0,
    ) -> None:
        """Update the parameters, then move their averages; see ``AdamW.step``."""
        scale_gradients(self.parameters, gradient_factor)
        for p, matrix in self.matrices.items():
            matrix.grad = None if p.grad is None else as_matrix(p.grad, p)
        self.muon.step()
        self.adamw.step()
        ops.ema_update(averages, self.parameters if averages else [], average_weight)


Optimizer = AdamW | Adam | SGD | Muon


def make(options: TrainingOptions, parameters: Named) -> Optimizer:
    """The optimizer of a run.

    Args:
        options: of the run.
        parameters: all of the network's, with their names.
    """
    lr, betas, decay = options.lr, options.betas, options.weight_decay
    momentum = (
        MOMENTUM.get(options.optimizer, 0.0) if options.momentum is None else options.momentum
    )
    plain = [p for _, p in parameters]
    if options.optimizer == "adamw" or (options.optimizer == "adam" and decay == 0):
        return AdamW(plain, lr, betas, options.eps, decay)
    if options.optimizer == "adam":
        fused = all(p.device.type in ("cpu", "cuda") for p in plain)
        return Adam(plain, lr, betas, options.eps, decay, fused=fused)
    if options.optimizer == "sgd":
        return SGD(plain, lr, momentum, weight_decay=decay, nesterov=options.nesterov)
    return Muon(
        parameters, lr=lr, momentum=momentum, betas=betas, eps=options.eps, weight_decay=decay
    )


def owner(optimizer: Optimizer, p: nn.Parameter) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """The optimizer of PyTorch's that updates a parameter, and what it knows the parameter as."""
    if not isinstance(optimizer, Muon):
        return optimizer, p
    if p in optimizer.matrices:
        return optimizer.muon, optimizer.matrices[p]
    return optimizer.adamw, p


def moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of the tensors that an optimizer keeps for each parameter, like the parameter."""
    if isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam)):
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()


def as_matrix(value: Tensor, p: Tensor) -> Tensor:
    """A tensor like the parameter ``p``, [O, ...], as a matrix of O rows; a view where it can be.

    The columns are in the order in which the parameter lies in memory, which makes no difference to
    Muon.
    """
    return (value.permute(0, 2, 3, 1) if _channels_last(p) else value).reshape(value.shape[0], -1)


def from_matrix(matrix: Tensor, p: Tensor) -> Tensor:
    """The inverse of :func:`as_matrix`; a view."""
    if not _channels_last(p):
        return matrix.view(p.shape)
    rows, channels, height, width = p.shape
    return matrix.view(rows, height, width, channels).permute(0, 3, 1, 2)


def _channels_last(p: Tensor) -> bool:
    return p.ndim == 4 and not p.is_contiguous()
