"""What solvers that go step by step share: asking for a score, and drawing noise."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.common.checks import check_floating
from fastdiff.common.inputs import whole_number
from fastdiff.common.progress import progress_bar
from fastdiff.sde.score import Score


@dataclass(frozen=True)
class Watched:
    """A score that is given images in the caller's dtype, and whose answers are looked at.

    Attributes:
        score: the score.
        dtype: that of the images it is given; those of a solver are in float32 at least.
        check_finite: raise where it is not finite, which waits for the device.
    """

    score: Score
    dtype: torch.dtype
    check_finite: bool

    def __call__(self, x: Tensor, time: Tensor, where: str) -> Tensor:
        """The score at images x [N, ...] and one time [] for all, in x's dtype.

        Raises:
            TypeError: it is no tensor.
            ValueError: it has another shape than x.
            FloatingPointError: it is not finite, and that was to be checked; names ``where``.
        """
        found = self.score(x.to(self.dtype), time.expand(x.shape[0]))
        if not isinstance(found, Tensor):
            raise TypeError(f"the score must return a tensor, got {type(found).__name__}")
        if found.shape != x.shape:
            raise ValueError(
                f"the score must return images of shape {tuple(x.shape)}, got {tuple(found.shape)}"
            )
        if self.check_finite:
            self._check(found, time, where)
        return found.to(x.dtype)

    def _check(self, found: Tensor, time: Tensor, where: str) -> None:
        wrong = found.isfinite().logical_not_().flatten(1).sum(1).tolist()
        if not any(wrong):
            return
        named = [f"{count} of image {n}" for n, count in enumerate(wrong) if count]
        more = f" and of {len(named) - 4} more" if len(named) > 4 else ""
        raise FloatingPointError(
            f"{where} (t = {time.item():g}): of the score's {found[0].numel()} values an image "
            f"these are not finite: {', '.join(named[:4])}{more}"
        )


def normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise like x; a generator of another device draws there."""
    where = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=where, dtype=x.dtype).to(x.device)


def counted(steps: int, progress: bool | str) -> Iterator[int]:
    """0..steps-1 beside a progress bar on standard error; a string describes it."""
    description = progress if isinstance(progress, str) else "sampling"
    return iter(progress_bar(range(steps), desc=description, leave=False, shown=bool(progress)))


def check_images(x: Tensor, name: str) -> None:
    """TypeError unless ``x`` is floating point, ValueError unless it has shape [N, ...]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    check_floating(x, name)
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape [N, ...], got {tuple(x.shape)}")


def check_count(value: int, name: str) -> int:
    """``value`` as int; TypeError unless it is a whole number, ValueError unless at least 1."""
    count = whole_number(value, name)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_positive(value: float, name: str) -> None:
    """ValueError unless ``value`` is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_known(name: str | None, known: Collection[str | None], what: str) -> None:
    """ValueError unless ``name`` is one of ``known``."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}, wanted one of {', '.join(map(str, known))}")
