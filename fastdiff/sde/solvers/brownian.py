"""Brownian paths of a batch, tried in steps that may be rejected and replaced by others."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.checks import beside
from fastdiff.sde.solvers.stepping import normal

ROUNDING = 1e-9  # of a step, within which two ends are the same


class Path:
    """What is known of the Brownian paths ahead.

    A path is known at some times: as gaps from one to the next, nearest first, and the increment
    over each. A step that ends inside a gap cuts it in two by the law of the Brownian bridge, one
    that goes on beyond them all adds a gap with new noise. Only :meth:`go` forgets anything.

    Args:
        x: images [M, ...], which the increments are like.
        generator: source of the noise.

    Attributes:
        gaps: float64 [M, K] on the CPU; 0 from where nothing is known.
        increments: [M, K, ...].
    """

    def __init__(self, x: Tensor, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.gaps = torch.zeros(len(x), 0, dtype=torch.float64, device="cpu")
        self.increments = x.new_zeros(len(x), 0, *x.shape[1:])
        # How many gaps the latest step spans.
        self._used = torch.zeros(len(x), dtype=torch.int64, device="cpu")

    def increment(self, h: Tensor) -> Tensor:
        """The increments [M, ...] over the next h, float64 [M]."""
        ends = self.gaps.cumsum(1)
        spanned = (self.gaps > 0) & (ends <= h[:, None] * (1 + ROUNDING))
        whole = spanned.sum(1)
        rest = h - (self.gaps * spanned).sum(1)
        rest = torch.where(rest > ROUNDING * h, rest, 0)
        self._cut(whole, rest)
        self._used = whole + (rest > 0)
        places = torch.arange(self.gaps.shape[1], device="cpu") < self._used[:, None]
        return (self.increments * _rows(places, self.increments)).sum(1)

    def go(self, where: Tensor) -> None:
        """Leave the latest step behind, in the paths asked for."""
        moved = self._used * where
        self._reorder(torch.arange(self.gaps.shape[1], device="cpu") + moved[:, None])
        known = int((self.gaps > 0).sum(1).max()) if len(self.gaps) else 0
        self.gaps, self.increments = self.gaps[:, :known], self.increments[:, :known]

    def keep(self, rows: Tensor) -> None:
        """Let the paths of all other images go."""
        self.gaps, self._used = self.gaps[rows], self._used[rows]
        self.increments = self.increments[rows.to(self.increments.device)]

    def _cut(self, place: Tensor, length: Tensor) -> None:
        """Know the paths so far into the gaps at ``place``, or beyond those known, if at all."""
        images, _, *shape = self.increments.shape
        self.gaps = torch.cat([self.gaps, self.gaps.new_zeros(images, 1)], 1)
        blank = self.increments.new_zeros(images, 1, *shape)
        self.increments = torch.cat([self.increments, blank], 1)
        image, device = torch.arange(len(place), device="cpu"), self.increments.device
        gap, whole = self.gaps[image, place], self.increments[image.to(device), place.to(device)]
        share = torch.where(gap > 0, length / gap, 0)
        noise = normal(whole, self.generator)
        part = beside(share, whole) * whole + beside((length * (1 - share)).sqrt(), whole) * noise
        left = torch.where(gap > 0, gap - length, 0)
        columns = torch.arange(self.gaps.shape[1], device="cpu")
        cutting = (length > 0) & (gap > 0)
        self._reorder(columns - ((columns > place[:, None]) & cutting[:, None]).long())
        here, after = (columns == place[:, None]), (columns == place[:, None] + 1)
        here, after = here & (length > 0)[:, None], after & cutting[:, None]
        self.gaps = torch.where(here, length[:, None], torch.where(after, left[:, None], self.gaps))
        values = torch.where(_rows(here, self.increments), part[:, None], self.increments)
        self.increments = torch.where(
            _rows(after, self.increments), (whole - part)[:, None], values
        )

    def _reorder(self, source: Tensor) -> None:
        """Gap j becomes what ``source`` [M, K] says stood there; nothing stood beyond the last."""
        count = self.gaps.shape[1]
        there = source < count
        source = source.clamp(max=max(count - 1, 0))
        self.gaps = self.gaps.gather(1, source) * there
        image = torch.arange(len(source), device="cpu")[:, None].to(self.increments.device)
        moved = self.increments[image, source.to(self.increments.device)]
        self.increments = moved * _rows(there, moved)


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    """A mask [M, K] beside increments [M, K, ...]."""
    return mask.to(like.device).view(*mask.shape, *[1] * (like.ndim - 2))
