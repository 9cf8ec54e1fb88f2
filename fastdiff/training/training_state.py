"""The tensors of a training state: each parameter's value and its moments in the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.common.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of AdamW's moments

Named = Sequence[tuple[str, nn.Parameter]]


def state_tensors(parameters: Named, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors from which :func:`restore` continues, by ``kind.parameter``.

    AdamW has no moments before step 1; they are recorded as zeros.

    Args:
        parameters: with their names in files.
        optimizer: of these parameters.
    """
    tensors: dict[str, Tensor] = {}
    for name, p in parameters:
        tensors[f"model.{name}"] = p
        for key in MOMENTS:
            moment = optimizer.state[p].get(key)
            tensors[f"{key}.{name}"] = torch.zeros_like(p) if moment is None else moment
    return tensors


@torch.no_grad()
def restore(
    parameters: Named,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    updates: int,
    path: Path,
) -> None:
    """Set parameters and moments to those of :func:`state_tensors`.

    Args:
        parameters: with their names in files.
        optimizer: of these parameters.
        tensors: the recorded values.
        updates: number of updates that the optimizer has made.
        path: the file of ``tensors``, for the text of errors.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    for name, p in parameters:
        # Values are copied into existing tensors, so that p and its moments keep their memory
        # format, which AdamW's kernels need.
        restored = {"model": p, **{key: torch.empty_like(p) for key in MOMENTS}}
        for key, target in restored.items():
            value = tensors.get(f"{key}.{name}")
            if value is None or value.shape != p.shape:
                seen = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise CheckpointError(
                    f"{path}: {key}.{name} must have shape {tuple(p.shape)}, got {seen}"
                )
            target.copy_(value)
        where = p.device if optimizer.defaults["fused"] else "cpu"
        optimizer.state[p] = {
            "step": torch.tensor(float(updates), device=where),
            **{key: restored[key] for key in MOMENTS},
        }
