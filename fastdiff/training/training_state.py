"""The tensors of a training state: each parameter's value and what the optimizer keeps for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoints.named_weights import MODEL
from fastdiff.common.errors import CheckpointError
from fastdiff.training.optimizers import Named, Optimizer, as_matrix, from_matrix, moments, owner


def state_tensors(parameters: Named, optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors from which :func:`restore` continues, by ``kind.parameter``.

    An optimizer has no moments before step 1; they are recorded as zeros, from which it begins.

    Args:
        parameters: with their names in files.
        optimizer: of these parameters.
    """
    tensors: dict[str, Tensor] = {}
    for name, p in parameters:
        tensors[f"{MODEL}.{name}"] = p
        used, known = owner(optimizer, p)
        state = used.state[known]
        for key in moments(used):
            moment = state.get(key)
            if moment is None:
                moment = torch.zeros_like(p)
            elif known is not p:
                moment = from_matrix(moment, p)
            tensors[f"{key}.{name}"] = moment
        if "step" in state:  # its own count: a step without a gradient is none
            tensors[f"step.{name}"] = state["step"]
    return tensors


@torch.no_grad()
def restore(
    parameters: Named,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    updates: int,
    path: Path,
) -> None:
    """Set parameters and the optimizer's state to those of :func:`state_tensors`.

    Args:
        parameters: with their names in files.
        optimizer: of these parameters.
        tensors: the recorded values.
        updates: number of updates that the optimizer has made, which is that of each parameter if
            it is not recorded.
        path: the file of ``tensors``, for the text of errors.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    for name, p in parameters:
        used, known = owner(optimizer, p)
        # Values are copied into existing tensors, so that p and its moments keep their memory
        # format, which AdamW's kernels need.
        restored = {key: torch.empty_like(p) for key in moments(used)}
        for key, target in {MODEL: p, **restored}.items():
            value = tensors.get(f"{key}.{name}")
            if value is None or value.shape != p.shape:
                seen = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise CheckpointError(
                    f"{path}: {key}.{name} must have shape {tuple(p.shape)}, got {seen}"
                )
            target.copy_(value)
        state = {k: v if known is p else as_matrix(v, p) for k, v in restored.items()}
        if isinstance(used, (torch.optim.AdamW, torch.optim.Adam)):
            where = p.device if used.defaults["fused"] else "cpu"
            count = tensors.get(f"step.{name}", torch.tensor(float(updates)))
            if count.numel() != 1:
                raise CheckpointError(f"{path}: step.{name} must be one number, got {count.shape}")
            state["step"] = count.reshape(()).float().to(where)
        used.state[known] = state
