"""Brownian paths of a batch, for steps that may be rejected and replaced by shorter ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.checks import beside
from fastdiff.sde.solvers.stepping import normal

SAME_TIME_RTOL = 1e-9  # share of a step within which two times are equal


class BrownianPath:
    """The future parts of the images' Brownian paths that have been sampled so far.

    A path is known at some times, stored as the gaps from each time to the next, nearest first, and
    the path's increment over each gap. A step that ends inside a gap splits it in two by the law of
    the Brownian bridge. A step that ends beyond all gaps adds one with new noise. Only
    :meth:`advance` forgets gaps.

    Args:
        x: images [M, ...]; increments have their shape, dtype and device.
        generator: source of the noise.

    Attributes:
        gaps: lengths of the gaps, float64 [M, K] on the CPU; unused entries are 0 and come last.
        increments: increments of the paths over the gaps, [M, K, ...].
    """

    def __init__(self, x: Tensor, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.gaps = torch.zeros(len(x), 0, dtype=torch.float64, device="cpu")
        self.increments = x.new_zeros(len(x), 0, *x.shape[1:])
        # The number of gaps that the latest step spans.
        self._used = torch.zeros(len(x), dtype=torch.int64, device="cpu")

    def increment(self, h: Tensor) -> Tensor:
        """The increments [M, ...] of the paths over the next h, float64 [M]."""
        ends = self.gaps.cumsum(1)
        spanned = (self.gaps > 0) & (ends <= h[:, None] * (1 + SAME_TIME_RTOL))
        whole = spanned.sum(1)
        rest = h - (self.gaps * spanned).sum(1)
        rest = torch.where(rest > SAME_TIME_RTOL * h, rest, 0)
        self._split(whole, rest)
        self._used = whole + (rest > 0)
        places = torch.arange(self.gaps.shape[1], device="cpu") < self._used[:, None]
        return (self.increments * _rows(places, self.increments)).sum(1)

    def advance(self, accepted: Tensor) -> None:
        """Move to the end of the latest step in the paths where it is ``accepted``, bool [M]."""
        moved = self._used * accepted
        self._reorder(torch.arange(self.gaps.shape[1], device="cpu") + moved[:, None])
        known = int((self.gaps > 0).sum(1).max()) if len(self.gaps) else 0
        self.gaps, self.increments = self.gaps[:, :known], self.increments[:, :known]

    def keep(self, rows: Tensor) -> None:
        """Keep the paths of the images ``rows``, int64, and drop all others."""
        self.gaps, self._used = self.gaps[rows], self._used[rows]
        self.increments = self.increments[rows.to(self.increments.device)]

    def _split(self, place: Tensor, length: Tensor) -> None:
        """Sample each path at ``length`` after the start of gap ``place``; at 0, do nothing.

        This splits the gap, or adds a gap if ``place`` is behind the last.
        """
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
        split = (length > 0) & (gap > 0)
        self._reorder(columns - ((columns > place[:, None]) & split[:, None]).long())
        here, after = (columns == place[:, None]), (columns == place[:, None] + 1)
        here, after = here & (length > 0)[:, None], after & split[:, None]
        self.gaps = torch.where(here, length[:, None], torch.where(after, left[:, None], self.gaps))
        values = torch.where(_rows(here, self.increments), part[:, None], self.increments)
        self.increments = torch.where(
            _rows(after, self.increments), (whole - part)[:, None], values
        )

    def _reorder(self, source: Tensor) -> None:
        """Replace gap j by gap ``source[:, j]``, [M, K]; a source beyond the last is empty."""
        count = self.gaps.shape[1]
        exists = source < count
        source = source.clamp(max=max(count - 1, 0))
        self.gaps = self.gaps.gather(1, source) * exists
        image = torch.arange(len(source), device="cpu")[:, None].to(self.increments.device)
        moved = self.increments[image, source.to(self.increments.device)]
        self.increments = moved * _rows(exists, moved)


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    """A mask [M, K] as [M, K, 1, ...], to broadcast with increments [M, K, ...]."""
    return mask.to(like.device).view(*mask.shape, *[1] * (like.ndim - 2))
