"""Classifier-free guidance: its scale in each step, and whether the model must run twice.

Under guidance the model gets 2 N images, the first N without the condition and the others with it
(Ho & Salimans 2022, arXiv:2207.12598). ``ops.sampler_step`` combines the two predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def per_step(guidance: float | Sequence[float] | Tensor, steps: int) -> list[float]:
    """The guidance scale of each step, from one number or one number per step.

    Raises:
        ValueError: a number of values other than 1 and ``steps``, or a value that is not finite.
        TypeError: values that are not numbers.
    """
    given: Any = guidance.tolist() if isinstance(guidance, Tensor) else guidance
    single = isinstance(given, (int, float))
    try:
        values = [float(value) for value in ([given] if single else given)]
    except (TypeError, ValueError):
        raise TypeError(f"guidance must be a number, or one per step, got {guidance!r}") from None
    if not single and len(values) != steps:
        raise ValueError(
            f"guidance must be one number, or {steps}, one for each step of the sampler, "
            f"got {len(values)}"
        )
    if not all(map(math.isfinite, values)):
        raise ValueError(f"guidance must be finite, got {guidance}")
    return values * steps if single else values


def is_guided(scales: Sequence[float], rescale: float, has_uncond: bool) -> bool:
    """Whether any step is guided, so that the model must predict with and without the condition.

    Raises:
        ValueError: guidance or rescale without ``uncond``, or a rescale outside [0, 1].
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must lie in [0, 1], got {rescale}")
    strength = next((scale for scale in scales if scale != 1), 1)
    if not has_uncond and (strength != 1 or rescale):
        what = f"guidance {strength}" if strength != 1 else f"guidance_rescale {rescale}"
        raise ValueError(f"{what} needs uncond, the model's arguments without the condition")
    return strength != 1
