"""Averages of weights that are made after a run: of its snapshots, or of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoints import checkpoint, forward_process
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import CheckpointError, InputError
from fastdiff.nn import ImageNetwork
from fastdiff.training import power_function, snapshots
from fastdiff.training.averages import Power
from fastdiff.training.power_function import Combination


def reconstruct(
    run: str | Path, std: float, step: int | None = None
) -> tuple[Checkpoint, Combination]:
    """The power function's average of any length, from the snapshots of a run.

    It is the combination of the snapshots whose profile is nearest to that of the average (Karras
    et al. 2024, arXiv:2312.02696, section 3 and appendix C). The sum is taken in float64.

    Args:
        run: the folder of a run with snapshots.
        std: relative standard deviation of the average's profile.
        step: the number of steps after which the average is wanted; None for that of the newest
            snapshot. Between two snapshots the residual is large.

    Returns:
        The averaged model, and the combination with its residual.

    Raises:
        InputError: ``std`` is out of range, or ``step`` is not among the run's steps.
        CheckpointError: the run has no checkpoint or no snapshots, or one is damaged.
    """
    power_function.check_std(std)
    kept = snapshots.find(Path(run))
    if not kept:
        raise CheckpointError(f"{run} has no snapshots of averages; a run with ema_std keeps them")
    last = max(snapshot.step for snapshot in kept)
    step = last if step is None else step
    if not 1 <= step <= last:
        raise InputError(f"the step must lie in 1..{last}, that of the newest snapshot, got {step}")
    found = power_function.combine(
        [snapshot.step for snapshot in kept], [snapshot.std for snapshot in kept], step, std
    )
    parts = (
        (float(factor), snapshot.read(), str(snapshot.path))
        for factor, snapshot in zip(found.coefficients, kept, strict=True)
    )
    model = checkpoint.load(run)
    return _with(model, _sum(parts, model.model), step, Power(std).name), found


def mean(paths: Sequence[str | Path], weights: str | None = None) -> Checkpoint:
    """The mean of the weights of checkpoints of one network.

    Args:
        paths: of the checkpoints, as ``fastdiff.checkpoints.checkpoint.load`` takes them.
        weights: of each checkpoint, as ``load`` takes it.

    Returns:
        The model with averaged weights; the rest is that of the last checkpoint.

    Raises:
        InputError: no path is given, or the checkpoints are of networks or processes that differ.
        CheckpointError: a checkpoint is missing or damaged.
    """
    if not paths:
        raise InputError("there are no checkpoints to average")
    last = checkpoint.load(paths[-1], weights)

    def parts() -> Iterable[tuple[float, Mapping[str, Tensor], str]]:
        for path in paths:
            loaded = checkpoint.load(path, weights)
            _check_same(loaded, last, path, paths[-1])
            yield 1 / len(paths), loaded.model.state_dict(), str(path)

    return _with(last, _sum(parts(), last.model), last.step, f"mean-of-{len(paths)}")


def _with(like: Checkpoint, weights: Mapping[str, Tensor], step: int, name: str) -> Checkpoint:
    model = type(like.model).from_weights(like.model.config, weights)
    return replace(like, model=model, step=step, weights=name)


def _sum(
    parts: Iterable[tuple[float, Mapping[str, Tensor], str]], model: ImageNetwork
) -> dict[str, Tensor]:
    """The sum of weights times a factor, in the dtypes of a model.

    Args:
        parts: a factor, weights, and where these are from.
        model: whose weights these are.

    Raises:
        CheckpointError: weights that do not fit the model.
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for factor, state, source in parts:
        if {name: value.shape for name, value in state.items()} != shapes:
            raise CheckpointError(f"{source} does not hold the weights of this network")
        for name, value in state.items():
            sums[name].add_(value.double(), alpha=factor)
    return {name: sums[name].to(value.dtype) for name, value in model.state_dict().items()}


def _check_same(one: Checkpoint, other: Checkpoint, path: str | Path, last: str | Path) -> None:
    """InputError unless two checkpoints are of one network, trained for one process."""
    for what, a, b in (
        ("networks", one.model.config, other.model.config),
        ("processes", *(forward_process.describe(each.forward) for each in (one, other))),
        ("predictions", one.prediction, other.prediction),
        ("classes", one.classes, other.classes),
    ):
        if a != b:
            raise InputError(f"{path} and {last} have different {what}: {a} and {b}")
