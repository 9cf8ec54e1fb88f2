"""Brownian paths of a batch, tried in steps that may be rejected and replaced by shorter ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops.checks import beside
from fastdiff.sde._evaluate import normal

ROUNDING = 1e-9  # of a gap, which a step that was to fill it may leave


class Path:
    """What is known of the Brownian paths ahead: their increments over gaps [M], nearest first.

    A step has the nearest gap to itself. One that is rejected leaves it known, and a shorter one
    cuts it in two by the law of the Brownian bridge; only an accepted one removes it.
    """

    def __init__(self, x: Tensor, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.gaps = [torch.zeros(len(x), dtype=torch.float64)]  # 0 where nothing is known
        self.increments = [torch.zeros_like(x)]

    def limit(self, h: Tensor) -> Tensor:
        """Lengths that end no later than the nearest gap."""
        known = self.gaps[0]
        return torch.where((known > 0) & (h > known * (1 - ROUNDING)), known, h)

    def increment(self, h: Tensor) -> Tensor:
        """The increments [M, ...] over lengths that ``limit`` has passed."""
        known, whole = self.gaps[0], self.increments[0]
        share = torch.where(known > 0, h / known, 0)
        variance = torch.where(known > 0, h * (1 - share), h)
        noise = normal(whole, self.generator)
        part = beside(share, whole) * whole + beside(variance.sqrt(), whole) * noise
        cut = known > h
        if bool(cut.any()):
            self.insert(cut, known - h, whole - part)
        self.gaps[0], self.increments[0] = h, part
        return part

    def insert(self, where: Tensor, gap: Tensor, increment: Tensor) -> None:
        """Put a gap second, where asked for."""
        if bool(self.gaps[-1][where].any()) or len(self.gaps) == 1:
            self.gaps.append(torch.zeros_like(gap))
            self.increments.append(torch.zeros_like(increment))
        for k in range(len(self.gaps) - 1, 0, -1):
            after = (gap, increment) if k == 1 else (self.gaps[k - 1], self.increments[k - 1])
            self.replace(k, where, *after)

    def forget(self, where: Tensor) -> None:
        """Remove the nearest gap, where asked for."""
        nothing = torch.zeros_like(self.gaps[0])
        for k in range(len(self.gaps) - 1):
            self.replace(k, where, self.gaps[k + 1], self.increments[k + 1])
        self.gaps[-1] = torch.where(where, nothing, self.gaps[-1])
        while len(self.gaps) > 1 and not bool(self.gaps[-1].any()):
            del self.gaps[-1], self.increments[-1]

    def replace(self, k: int, where: Tensor, gap: Tensor, increment: Tensor) -> None:
        """Put a gap in place k, where asked for."""
        rows = where.to(increment.device).view(-1, *[1] * (increment.ndim - 1))
        self.gaps[k] = torch.where(where, gap, self.gaps[k])
        self.increments[k] = torch.where(rows, increment, self.increments[k])

    def keep(self, rows: Tensor) -> None:
        """Let the paths of all other images go."""
        self.gaps = [gap[rows] for gap in self.gaps]
        self.increments = [one[rows.to(one.device)] for one in self.increments]
