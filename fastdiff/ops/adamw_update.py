"""A step of AdamW on all weights in one pass, which also clips, and averages the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.common.checks import check_device, check_floating, check_like, check_same_kind
from fastdiff.ops import backend, reference
from fastdiff.ops.profiling import span

torch.library.define(
    "fastdiff::adamw_update",
    "(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] averages, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, int step, float gradient_factor, float average_weight) -> ()",
)
torch.library.define("fastdiff::gradient_norm", "(Tensor[] gradients) -> Tensor")


@torch.no_grad()
def adamw_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor] = (),
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    step: int,
    gradient_factor: float = 1.0,
    average_weight: float = 0.0,
) -> None:
    """A step of AdamW in place (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2).

    The arithmetic is that of ``torch.optim.AdamW``. In the same pass the gradient is multiplied by
    a factor, which is not written, and averages a of the parameters follow them:
    a += average_weight (p - a), as in ``ema_update``. On a CPU each of the tensors is read once
    and, but for the gradients, written once. Elsewhere PyTorch computes it in many passes.

    Args:
        parameters: float32, or all of them float64, on one device.
        gradients: one for each parameter, like it. On a CPU the gradient and what follows must
            have the strides of its parameter, without gaps.
        exp_avgs: the gradients' first moments, likewise.
        exp_avg_sqs: the gradients' second moments, likewise.
        averages: running averages of the parameters, likewise; or empty.
        lr: learning rate.
        betas: decays of the moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled: the parameter is multiplied by 1 - lr weight_decay.
        step: the number of this step, from 1.
        gradient_factor: of the gradient, to clip its norm.
        average_weight: how far an average moves towards its parameter, in 0..1.

    Raises:
        TypeError: a dtype is another.
        ValueError: numbers, shapes, strides or devices do not fit, or a value is outside its range.
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must lie in [0, 1), got {betas}")
    if step < 1:
        raise ValueError(f"step must be counted from 1, got {step}")
    if not 0 <= average_weight <= 1:
        raise ValueError(f"average_weight must lie in 0..1, got {average_weight}")
    lists = parameters, gradients, exp_avgs, exp_avg_sqs, averages
    numbers = (lr, *betas, eps, weight_decay, step, gradient_factor, average_weight)
    with span("adamw_update"):
        _run("adamw_update", _check, *map(list, lists), *numbers)


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all elements of all gradients together, a float64 scalar.

    On a CPU the squares are summed in float64, in an order that is the same for any number of
    threads.

    Args:
        gradients: floating point tensors on one device.

    Raises:
        TypeError: a tensor is not floating point or not dense.
        ValueError: tensors are on several devices.
    """
    with span("gradient_norm"):
        norm: Tensor = _run("gradient_norm", _check_gradients, list(gradients))
        return norm


def _run(name: str, check: Callable[..., None], tensors: list[Tensor], *others: Any) -> Any:
    """An operation by the kernel for a CPU, else by the reference.

    With hundreds of tensors the check takes long beside the kernel, which refuses bad arguments
    itself; so it runs only after an error, for its better text.
    """
    kernel = all(value.is_cpu and backend.kernel_runs(value) for value in tensors)
    if not tensors or not kernel:
        check(tensors, *others)
        return getattr(reference, name)(tensors, *others)
    try:
        return getattr(torch.ops.fastdiff, name)(tensors, *others)
    except Exception:
        check(tensors, *others)
        raise


def _check(
    parameters: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor], averages: list[Tensor], *numbers: float,
) -> None:  # fmt: skip
    lists = {"gradients": gradients, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if averages:
        lists["averages"] = averages
    for name, values in lists.items():
        if len(values) != len(parameters):
            raise ValueError(
                f"there must be as many {name} as parameters, got {len(values)} and "
                f"{len(parameters)}"
            )
    for index, p in enumerate(parameters):
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"parameters[{index}] must be float32 or float64, got {p.dtype}")
        check_same_kind(p, parameters[0], f"parameters[{index}]", "parameters[0]")
        for name, values in lists.items():
            check_like(values[index], p, f"{name}[{index}]", f"parameters[{index}]")


def _check_gradients(gradients: list[Tensor]) -> None:
    for index, gradient in enumerate(gradients):
        check_floating(gradient, f"gradients[{index}]")
        check_device(gradient, gradients[0], f"gradients[{index}]", "gradients[0]")


@torch.library.register_fake("fastdiff::adamw_update")
def _fake(  # type: ignore[no-untyped-def]
    parameters, gradients, exp_avgs, exp_avg_sqs, averages, *numbers
) -> None:
    _check(parameters, gradients, exp_avgs, exp_avg_sqs, averages)


@torch.library.register_fake("fastdiff::gradient_norm")
def _fake_norm(gradients: list[Tensor]) -> Tensor:
    _check_gradients(gradients)
    device = gradients[0].device if gradients else None
    return torch.empty((), dtype=torch.float64, device=device)
