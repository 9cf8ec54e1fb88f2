"""Inpainting: a known part of the images is set to the noised image after every step.

After each step the known part becomes alpha image + sigma z at the level reached, with new noise z
(Lugmayr et al. 2022, RePaint, arXiv:2201.09865, eq. 8). The generated part was computed without
this z. To make both fit, RePaint repeats steps: x is noised again by several steps, and these steps
are taken again (algorithm 1 and section 4.2). :func:`resampled` plans this beforehand as a longer
table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdiff.samplers import Table
from fastdiff.sampling.arguments import reads_earlier

# First rows of the counter-based noise of the known part, and of noising x again. The sampler's own
# noise uses the rows of its table.
KNOWN_ROW, JUMP_ROW = 2**30, 2**31

Level = tuple[float, float]  # alpha and sigma


@dataclass(frozen=True)
class Jump:
    """Noising x again to an earlier level: x = share x + sigma z."""

    share: float
    sigma: float


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows of a run in order, with repeated steps.

    Attributes:
        table: the table of these rows, in which a repeated step counts as another step.
        steps: for each row the sampler's step that it belongs to.
        ends: for each row the level of x after it.
        jumps: the jumps back, by the row after which each is made.
    """

    table: Table
    steps: list[int]
    ends: list[Level]
    jumps: dict[int, Jump]


def resampled(table: Table, resamplings: int, jump_length: int) -> Plan:
    """A sampler's rows, with steps repeated as in RePaint.

    Args:
        table: the sampler's table.
        resamplings: how often each group of steps is taken; 1 repeats nothing.
        jump_length: number of steps in a group.

    Raises:
        ValueError: a group as long as the whole run, or a sampler whose steps read values of
            earlier steps: after a jump back these values would belong to less noise.
    """
    levels = [(alpha, sigma) for alpha, sigma in table.levels.tolist()]
    if resamplings == 1:
        return Plan(table, table.steps.tolist(), levels[1:], {})
    if jump_length >= table.num_steps:
        raise ValueError(
            f"jump_length must be below the number of steps, {table.num_steps}, got {jump_length}"
        )
    rows_of = [(table.steps == step).nonzero().flatten() for step in range(table.num_steps)]
    if any(reads_earlier(table.values[rows]) for rows in rows_of):
        raise ValueError(
            f"resamplings go back to earlier steps, whose values {table.name} keeps for later "
            "ones: take a sampler that keeps nothing between steps, such as ddpm, ddim or euler"
        )
    visited, numbers, jumps = [], [], {}
    for number, (step, back) in enumerate(_visits(table.num_steps, resamplings, jump_length)):
        visited.append(rows_of[step])
        numbers.append(torch.full_like(rows_of[step], number))
        if back is not None:
            row = sum(map(len, visited)) - 1
            jumps[row] = _jump(levels[rows_of[step + 1][0]], levels[rows_of[back][0]])
    rows = torch.cat(visited)
    longer = replace(
        table,
        values=table.values[rows],
        timesteps=table.timesteps[rows],
        steps=torch.cat(numbers),
        levels=torch.cat([table.levels[rows], table.levels[-1:]]),
    )
    return Plan(longer, table.steps[rows].tolist(), [levels[row + 1] for row in rows], jumps)


def _visits(steps: int, resamplings: int, length: int) -> Iterator[tuple[int, int | None]]:
    """Steps in the order in which they are taken, and the step to go back to after each, or None.

    Jumps back start at the levels 0, length, 2 length, ... counted from the run's end, if they have
    ``length`` steps before them. A level is jumped from until it has been reached ``resamplings``
    times.
    """
    left = {level: resamplings - 1 for level in range(0, steps - length, length)}
    step = 0
    while step < steps:
        level, back = steps - 2 - step, None  # level 0 is the last level with noise
        if left.get(level, 0) > 0:
            left[level] -= 1
            back = step + 1 - length
        yield step, back
        step = step + 1 if back is None else back


def _jump(start: Level, end: Level) -> Jump:
    """q(x_end | x_start) for an end with more noise, on any Gaussian path."""
    share = end[0] / start[0]
    return Jump(share, math.sqrt(max(end[1] ** 2 - (share * start[1]) ** 2, 0.0)))


@dataclass(frozen=True, eq=False)
class Known:
    """The known part of the images.

    Attributes:
        image: [1 or N, C, ...], in the table's dtype.
        mask: [1 or N, 1 or C, ...], in the same dtype: 1 where to generate, 0 where the image is
            known.
    """

    image: Tensor
    mask: Tensor

    def take(self, part: slice) -> Known:
        """The known part of a slice of the batch."""

        def cut(value: Tensor) -> Tensor:
            return value if value.shape[0] == 1 else value[part]

        return Known(cut(self.image), cut(self.mask))

    def restore(self, x: Tensor, level: Level, noise: Tensor | None) -> None:
        """x = mask x + (1 - mask) (alpha image + sigma noise), in place.

        Without noise, after the last row, the known part is the image itself, whatever level the
        sampler ends at.
        """
        known = self.image if noise is None else noised(self.image, noise, *level)
        x.copy_(torch.lerp(known, x.to(known.dtype), self.mask))


def noised(image: Tensor, noise: Tensor, alpha: float, sigma: float) -> Tensor:
    """alpha image + sigma noise."""
    return torch.add(alpha * image, noise, alpha=sigma)
