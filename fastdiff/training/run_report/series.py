"""Curves: values by step, read from logs, smoothed, and thinned without losing their extremes."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

FAULT = "fault"  # the entry of losses.jsonl that steps have which were left out
BUCKETS = 500  # of a thinned curve: about one for each pixel of a chart's width
SMOOTHED_SHARE = 40  # a smoothed value is the mean of one in so many of all values ...
LONGEST_MEAN = 1000  # ... but of no more than this many


@dataclass(frozen=True)
class Series:
    """Finite values at rising steps.

    Attributes:
        steps: float64 [N].
        values: float64 [N].
        left_out: number of values that were not finite, such as the loss of a skipped step.
    """

    steps: np.ndarray
    values: np.ndarray
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.steps)


def read_log(path: Path) -> dict[str, Series]:
    """The numbers of a log of one JSON object a line, by their names; {} if there is no file.

    null stands for a value that is not finite, and so does the text of :data:`FAULT`, whose curve
    thus has the number of such steps as ``left_out``. A number k of a list has the name of the list
    and ``.k``. Lines that are not complete, and lines without a step, are left out: a log may be
    read while it is written.
    """
    columns: dict[str, tuple[array[float], array[float]]] = {}
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
                step = float(entry.pop("step"))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            for name, value in _numbers(entry):
                steps, values = columns.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                values.append(value)
    return {name: _finite(np.array(s), np.array(v)) for name, (s, v) in columns.items()}


def window(series: Series) -> int:
    """The number of values W that a smoothed curve takes means of; 1 for no smoothing."""
    return max(1, min(LONGEST_MEAN, len(series) // SMOOTHED_SHARE))


def smoothed(series: Series) -> Series:
    """Means over about W values, half of them before and half after the step.

    A mean of the values before alone would lag behind a falling curve. Near the first step the mean
    is of fewer values, as many before the step as after it; near the last step of those there are.
    """
    half, count = window(series) // 2, len(series)
    if half == 0:
        return series
    # The mean is subtracted first, so that the sums stay small and lose few digits.
    middle = series.values.mean()
    sums = np.concatenate([[0.0], np.cumsum(series.values - middle)])
    at = np.arange(count)
    reach = np.minimum(half, at)
    first, end = at - reach, np.minimum(count, at + reach + 1)
    return Series(series.steps, (sums[end] - sums[first]) / (end - first) + middle)


def thinned(series: Series, buckets: int = BUCKETS) -> Series:
    """At most two values for each of the buckets: its least and its largest, in their order.

    The first and the last value are kept as well.
    """
    if len(series) <= 2 * buckets:
        return series
    edges = np.linspace(0, len(series), buckets + 1).astype(int)
    kept = [0, len(series) - 1]
    for start, stop in pairwise(edges):
        part = series.values[start:stop]
        kept += [start + int(part.argmin()), start + int(part.argmax())]
    chosen = np.unique(kept)
    return Series(series.steps[chosen], series.values[chosen], series.left_out)


def ratio(top: Series, bottom: Series, factor: float = 1.0) -> Series:
    """The quotients of two series of the same steps."""
    return _finite(top.steps, factor * top.values / np.maximum(bottom.values, 1e-12))


def _numbers(entry: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in entry.items():
        if isinstance(value, list):
            found += _numbers({f"{name}.{k}": member for k, member in enumerate(value)})
        elif value is None or name == FAULT:
            found.append((name, math.nan))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((name, float(value)))
    return found


def _finite(steps: np.ndarray, values: np.ndarray) -> Series:
    kept = np.isfinite(values)
    return Series(steps[kept], values[kept], int(len(values) - kept.sum()))
