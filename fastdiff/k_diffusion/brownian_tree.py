"""Noise of a Brownian path that can be asked for any interval, in any order."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.common.checks import wide_dtype
from fastdiff.common.inputs import checked_seeds

# A cell of the tree is not halved again if it is narrower than this share of its times, or of the
# whole path. Two times within one such cell share a part of their noise.
NARROW, NARROWEST = 2.0**-12, 2.0**-24
ROUNDING = 1e-6  # share of the path by which a time may miss its ends
Seed = int | Sequence[int] | None


class _Path(Protocol):
    """A Brownian path, as a function of the interval."""

    def __call__(self, start: float, end: float) -> Tensor:
        """The increment from ``start`` to a later ``end``."""


class BrownianTreeNoiseSampler:
    """Standard noise for the steps of a sampler, all of one Brownian path per image.

    For steps over [a, b] and [b, c] it gives the noise that a step over [a, c] would have, in two
    parts. So runs with more steps follow the same path, and their images converge.

    With torchsde installed the path is that of its ``BrownianTree``, and a seed gives k-diffusion's
    own noise. Without it the path is :class:`VirtualBrownianTree`, of the same law; a UserWarning
    says so, since a seed then gives other images than in k-diffusion.

    Args:
        x: images [N, C, ...], whose shape, dtype and device the noise has.
        sigma_min: the lower end of the path.
        sigma_max: its upper end.
        seed: of the path, one for all images or N of them; None draws one from PyTorch's global
            generator. With N seeds an image's noise depends on its own alone.
        transform: maps sigma to the path's time.

    Raises:
        TypeError: a seed that is no whole number.
        ValueError: another number of seeds than images, or both ends at one time.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: float | Tensor,
        sigma_max: float | Tensor,
        seed: Seed = None,
        transform: Callable[[Tensor], Tensor] = lambda sigma: sigma,
    ) -> None:
        self.transform = transform
        first, last = self._time(sigma_min), self._time(sigma_max)
        if not (first < last or last < first):
            raise ValueError(
                f"sigma_min and sigma_max must have different times, got {first:g} and {last:g}"
            )
        # As in k-diffusion, time runs from sigma_min to sigma_max: a sampler's steps run backwards
        # and take increments with the other sign.
        self.sign, ends = (1.0, (first, last)) if first < last else (-1.0, (last, first))
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, ()).item())
        self.path: _Path
        try:
            torchsde: Any = importlib.import_module("torchsde")
        except ImportError:
            warnings.warn(
                "torchsde is not installed, so that noise is drawn from fastdiff's own Brownian "
                'tree, whose seeds give other noise than those of k-diffusion: "pip install '
                'torchsde" gives the same',
                stacklevel=2,
            )
            self.path = VirtualBrownianTree(x, *ends, seed)
        else:
            self.path = _of_torchsde(torchsde, x, *ends, seed)

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """Noise of unit variance for the step from ``sigma`` to ``sigma_next``, like x.

        Raises:
            ValueError: the two are equal, or outside the path.
        """
        start, end = self._time(sigma), self._time(sigma_next)
        sign, low, high = (self.sign, start, end) if start < end else (-self.sign, end, start)
        if not low < high:
            raise ValueError(f"a step needs two levels, got {sigma} and {sigma_next}")
        return self.path(low, high) * (sign / math.sqrt(high - low))

    def _time(self, sigma: float | Tensor) -> float:
        return float(self.transform(torch.as_tensor(sigma)))


class VirtualBrownianTree:
    """A Brownian path as a pure function of its seed and of time, which keeps no path.

    Time is halved again and again; the path in the middle of a cell follows from its values at both
    ends by the law of the Brownian bridge, with noise that the cell's number selects from a
    counter-based generator (Li et al. 2020, arXiv:2001.01328, algorithm 3). Only the cells of the
    latest time are kept: the next time asked for is most often near.

    Args:
        x: images [N, C, ...], whose shape, dtype and device the increments have.
        start: the first time, where the path is 0.
        end: the last time.
        seed: one for all images or N of them, see :class:`BrownianTreeNoiseSampler`.
    """

    def __init__(self, x: Tensor, start: float, end: float, seed: int | Sequence[int]) -> None:
        self.seeds = checked_seeds(seed, None, len(x)).to(x.device)
        self.shape, self.dtype, self.wide = x.shape, x.dtype, wide_dtype(x.dtype)
        self.start, self.end = start, end
        zero = torch.zeros(self.shape, dtype=self.wide, device=x.device)
        self._cells = [_Cell(1, start, end, zero, math.sqrt(end - start) * self._noise(0))]
        self._latest: dict[float, Tensor] = {}

    def __call__(self, start: float, end: float) -> Tensor:
        """The increment from ``start`` to ``end``, like x.

        Raises:
            ValueError: a time outside the path.
        """
        values = {t: self._at(t) for t in (start, end)}
        self._latest = values  # a sampler's next step begins where this one ends
        return (values[end] - values[start]).to(self.dtype)

    def _at(self, t: float) -> Tensor:
        """The path at time t, in the wide dtype."""
        if t in self._latest:
            return self._latest[t]
        # A level computed twice, in two dtypes, may lie outside the path by a rounding.
        slack = ROUNDING * (self.end - self.start)
        if not self.start - slack <= t <= self.end + slack:
            raise ValueError(f"the path goes from {self.start:g} to {self.end:g}, got {t:g}")
        t = min(max(t, self.start), self.end)
        while not self._cells[-1].start <= t <= self._cells[-1].end:
            self._cells.pop()
        while True:
            cell = self._cells[-1]
            width = cell.end - cell.start
            if t in (cell.start, cell.end):
                return cell.first if t == cell.start else cell.last
            largest = max(abs(cell.start), abs(cell.end))
            if width <= max(NARROW * largest, NARROWEST * (self.end - self.start)):
                return self._between(cell, t)
            middle = (cell.start + cell.end) / 2
            value = self._between(cell, middle)
            if t < middle:
                half = _Cell(2 * cell.number, cell.start, middle, cell.first, value)
            else:
                half = _Cell(2 * cell.number + 1, middle, cell.end, value, cell.last)
            self._cells.append(half)

    def _between(self, cell: _Cell, t: float) -> Tensor:
        """The Brownian bridge over a cell at a time inside it, with the cell's noise."""
        share = (t - cell.start) / (cell.end - cell.start)
        std = math.sqrt((t - cell.start) * (1 - share))
        return torch.lerp(cell.first, cell.last, share).add_(self._noise(cell.number), alpha=std)

    def _noise(self, row: int) -> Tensor:
        return ops.philox_normal(self.seeds, row, self.shape, self.wide)


class _Cell(NamedTuple):
    """An interval of time, its number in the tree, and the path at both ends."""

    number: int
    start: float
    end: float
    first: Tensor
    last: Tensor


def _of_torchsde(
    torchsde: Any, x: Tensor, start: float, end: float, seed: int | Sequence[int]
) -> _Path:
    """The path of torchsde's BrownianTree for one seed, or one tree an image for N seeds."""
    if isinstance(seed, int):
        return _tree(torchsde, torch.zeros_like(x), start, end, seed)
    if len(seed) != len(x):
        raise ValueError(f"seed must be one whole number, or {len(x)}, got {len(seed)}")
    trees = [_tree(torchsde, torch.zeros_like(x[0]), start, end, each) for each in seed]
    return lambda low, high: torch.stack([tree(low, high) for tree in trees])


def _tree(torchsde: Any, w0: Tensor, start: float, end: float, seed: int) -> _Path:
    tree: _Path = torchsde.BrownianTree(t0=start, w0=w0, t1=end, entropy=seed)
    return tree
