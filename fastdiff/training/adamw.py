"""The optimizer: AdamW, which on a CPU clips and averages the weights in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` with the same state, whose step also clips and averages.

    On a CPU, float32 and float64 parameters are updated by ``ops.adamw_update``, elsewhere by
    PyTorch's fused step where there is one.

    Args:
        params: the parameters, all on one device.
        lr: learning rate.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        params = list(params)
        fused = all(p.device.type in ("cpu", "cuda") for p in params)
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        gradient_factor: float = 1.0,
        averages: Sequence[Tensor] = (),
        average_weight: float = 0.0,
    ) -> Any:
        """Update the parameters that have a gradient, then move the averages of all parameters.

        Args:
            closure: as of ``torch.optim.Optimizer.step``; its result is returned.
            gradient_factor: of the gradients, see :func:`clipping_factor`. ``ops.adamw_update``
                leaves the gradients as they are; elsewhere they are multiplied in place.
            averages: running averages, one for each parameter in the order of the groups, or none.
            average_weight: how far they move towards the parameters, in 0..1.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        if averages and len(averages) != len(parameters):
            raise ValueError(
                f"there must be as many averages as parameters, got {len(averages)} and "
                f"{len(parameters)}"
            )
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if not self._by_kernel(parameters):
            scale_gradients(parameters, gradient_factor)
            super().step()
            ops.ema_update(averages, parameters if averages else [], average_weight)
            return result
        average_of = dict(zip(parameters, averages, strict=True)) if averages else {}
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            for step, members in self._by_step(updated).items():
                states = [self.state[p] for p in members]
                ops.adamw_update(
                    members,
                    [p.grad for p in members if p.grad is not None],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [average_of.pop(p) for p in members] if averages else [],
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=step,
                    gradient_factor=gradient_factor,
                    average_weight=average_weight,
                )
        ops.ema_update(list(average_of.values()), list(average_of), average_weight)
        return result

    def _by_kernel(self, parameters: list[nn.Parameter]) -> bool:
        """Whether ``ops.adamw_update`` does what the groups ask for."""
        flags = ("amsgrad", "maximize", "differentiable")  # a loaded state may have set them
        return all(p.is_cpu and p.dtype in (torch.float32, torch.float64) for p in parameters) and (
            not any(group[flag] for group in self.param_groups for flag in flags)
        )

    def _by_step(self, parameters: list[nn.Parameter]) -> dict[int, list[nn.Parameter]]:
        """Counts a step of each parameter; the parameters by the number of the step."""
        for p in parameters:
            if not self.state[p]:
                zeros = torch.zeros_like(p), torch.zeros_like(p)
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": zeros[0],
                    "exp_avg_sq": zeros[1],
                }
        steps = [self.state[p]["step"] for p in parameters]
        if steps:  # PyTorch refuses an empty list
            torch._foreach_add_(steps, 1)
        found: dict[int, list[nn.Parameter]] = {}
        for p, step in zip(parameters, steps, strict=True):
            found.setdefault(int(step), []).append(p)
        return found


def scale_gradients(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Multiply the gradients of parameters in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if factor != 1 and gradients:  # PyTorch refuses an empty list
        torch._foreach_mul_(gradients, factor)


def clipping_factor(norm: float, largest: float) -> float:
    """The factor that clips gradients of norm ``norm`` to ``largest``.

    It is that of ``torch.nn.utils.clip_grad_norm_``.
    """
    return min(1.0, largest / (norm + 1e-6))
