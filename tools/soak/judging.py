"""Whether a run of the soak has lost anything, beside the same run without interruption."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastdiff.checkpoints import checkpoint, resumable
from tools.soak.interruptions import FailedError

LOSSES = "losses.jsonl"


def check_progress(out: Path, whole: Path, before: int) -> int:
    """Check an interrupted run.

    Args:
        out: its folder.
        whole: the folder of the run without interruption.
        before: step of the newest checkpoint before the interruption; 0 without one.

    Returns:
        The step of the newest checkpoint.

    Raises:
        FailedError: that checkpoint is damaged or older than ``before``, or the log has not each
            step up to it once.
    """
    step = 0
    if checkpoint.newest(out) is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a damaged checkpoint is a warning
            try:
                step = resumable.find(out).saved.step
            except (ValueError, UserWarning) as error:
                raise FailedError(str(error)) from None
    if step < before:
        raise FailedError(f"the newest checkpoint is that of step {step}, it was that of {before}")
    log, wanted = out / LOSSES, (whole / LOSSES).read_text(encoding="utf-8").splitlines()[:step]
    found = log.read_text(encoding="utf-8").splitlines()[:step] if log.exists() else []
    if found != wanted:
        raise FailedError(f"{LOSSES} differs up to step {step}, the newest checkpoint")
    return step


def check_end(out: Path, whole: Path, *, all_kept: bool = True) -> None:
    """Check a run that is done; FailedError unless it is the whole run, bit for bit.

    Args:
        out: its folder.
        whole: the folder of the run without interruption.
        all_kept: False for a run without those snapshots of averages that a full disk refused.
    """
    ours, theirs = checkpoint.newest(out), checkpoint.newest(whole)
    if ours is None or theirs is None or ours.name != theirs.name:
        raise FailedError(f"the last checkpoint is {ours}, wanted that of {theirs}")
    _compare(ours, theirs, theirs.glob("*.safetensors"))
    kept = [path for path in whole.glob("snapshots/*/*.safetensors")]
    _compare(
        out, whole, [path for path in kept if all_kept or (out / path.relative_to(whole)).exists()]
    )
    facts = [_facts(folder / checkpoint.TRAINING) for folder in (ours, theirs)]
    if facts[0] != facts[1]:
        raise FailedError(f"{checkpoint.TRAINING} differs")
    if (out / LOSSES).read_bytes() != (whole / LOSSES).read_bytes():
        raise FailedError(f"{LOSSES} differs")
    left = [path.name for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
    if left:
        raise FailedError(f"parts of checkpoints are left: {', '.join(left)}")


def _compare(ours: Path, theirs: Path, files: Iterable[Path]) -> None:
    """FailedError unless files of tensors in ``theirs`` are in ``ours`` too, with the same bits."""
    for path in files:
        name = path.relative_to(theirs)
        if not (ours / name).exists():
            raise FailedError(f"there is no {name}")
        found, wanted = load_file(ours / name), load_file(path)
        if set(found) != set(wanted):
            raise FailedError(f"{name} has other tensors")
        differing = [key for key in wanted if not _same_bits(found[key], wanted[key])]
        if differing:
            raise FailedError(f"{len(differing)} of {len(wanted)} tensors of {name} differ")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (a, b)))


def _facts(path: Path) -> dict[str, Any]:
    """The JSON values of a training state, without the caller's, which name the folder."""
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    facts.pop("record", None)
    return facts
