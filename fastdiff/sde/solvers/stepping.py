"""Helpers of the solvers: a checked score, noise, a counted loop, and checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.common.checks import check_floating
from fastdiff.common.inputs import whole_number
from fastdiff.common.progress import progress_bar
from fastdiff.sde.score import Score


@dataclass(frozen=True)
class CheckedScore:
    """A score that gets images in the caller's dtype, and whose results are checked.

    Attributes:
        score: the score.
        dtype: dtype of the images that the score gets; the solver's own are float32 or float64.
        check_finite: raise if a score is not finite, which waits for the device.
    """

    score: Score
    dtype: torch.dtype
    check_finite: bool

    def __call__(self, x: Tensor, time: Tensor, where: str) -> Tensor:
        """The score at images x [N, ...] and one time [] for all of them, in x's dtype.

        Args:
            x: images [N, ...].
            time: float64 [].
            where: the place in the loop, for error messages.

        Raises:
            TypeError: the score is no tensor.
            ValueError: the score has another shape than x.
            FloatingPointError: with ``check_finite``, the score is not finite.
        """
        gradient = self.score(x.to(self.dtype), time.expand(x.shape[0]))
        if not isinstance(gradient, Tensor):
            raise TypeError(f"the score must return a tensor, got {type(gradient).__name__}")
        if gradient.shape != x.shape:
            raise ValueError(
                f"the score must return images of shape {tuple(x.shape)}, "
                f"got {tuple(gradient.shape)}"
            )
        if self.check_finite:
            self._refuse_nonfinite(gradient, time, where)
        return gradient.to(x.dtype)

    def _refuse_nonfinite(self, gradient: Tensor, time: Tensor, where: str) -> None:
        wrong = gradient.isfinite().logical_not_().flatten(1).sum(1).tolist()
        if not any(wrong):
            return
        named = [f"{count} of image {n}" for n, count in enumerate(wrong) if count]
        more = f" and of {len(named) - 4} more" if len(named) > 4 else ""
        raise FloatingPointError(
            f"{where} (t = {time.item():g}): of the score's {gradient[0].numel()} values an image "
            f"these are not finite: {', '.join(named[:4])}{more}"
        )


def normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise like x; noise of another device's generator is copied to x's."""
    where = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=where, dtype=x.dtype).to(x.device)


def with_progress(steps: int, progress: bool | str) -> Iterator[int]:
    """Iterate 0..steps-1 with a progress bar on standard error; a string is the bar's label."""
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
    """``value`` as int; TypeError if it is no whole number, ValueError if it is below 1."""
    count = whole_number(value, name)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_positive(value: float, name: str) -> None:
    """ValueError unless ``value`` is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
