"""The memory that a graph's packed weights may take, spent where it saves the most time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fastdiff.compiler.choose.algorithms import PRECISIONS, cost, estimates, packed_bytes, product
from fastdiff.compiler.choose.sizes import Sizes
from fastdiff.compiler.graph.nodes import value
from fastdiff.compiler.match.fused import Match, joined
from fastdiff.ops.backend import kernel_runs

# Without a bound, packed weights may take FREE_BYTES for the quickest algorithms. Where these take
# more, packed weights as large as the weights themselves must save MEMORY_SHARE of the time that
# the graph's convolutions and linear layers take.
MEMORY_SHARE, FREE_BYTES = 0.08, 1 << 30
CALL_OVERHEAD_SECONDS = 5e-6  # per call of an operation, besides its computation
DEFAULT_DIMENSION = 32  # assumed for a dynamic dimension for which the graph has no example
Table = dict[Sizes, dict[str, float]]  # seconds by algorithm


@dataclass(frozen=True)
class Option:
    """A way to compute one or several matches.

    Attributes:
        size: bytes of its packed and copied weights.
        seconds: estimated time, handicaps included.
        name: the algorithm.
        together: whether several weights are joined into one.
    """

    size: int
    seconds: float
    name: str = "plain"
    together: bool = False


@dataclass
class _Unit:
    """Matches with one decision: the first of ``options`` takes no memory. ``group``: joinable."""

    matches: list[Match]
    options: list[Option]
    group: bool


class Budget:
    """Which algorithms the convolutions of one graph may use.

    Args:
        precision: a key of ``algorithms.PRECISIONS``.
        bound: of the bytes that the graph's weights may be packed and copied into; None for any
            that save enough time.
        measured: choose by the clock where kernels run, else by the sizes alone.

    Attributes:
        seconds_per_byte: how many seconds a byte of packed weight must save; 0 with a bound.
    """

    def __init__(self, precision: str, bound: int | None, measured: bool) -> None:
        self.names, self.bound = PRECISIONS[precision], bound
        self.measured = measured and kernel_runs(torch.empty(0, device="cpu"))
        self.seconds_per_byte = 0.0
        self._allowed: dict[tuple[Node, ...], tuple[str, ...]] = {}

    def allowed(self, weights: Sequence[Node]) -> tuple[str, ...]:
        """The algorithms that the convolution by ``weights``, concatenated, may use."""
        return self._allowed.get(tuple(weights), self.names if self.bound is None else ("plain",))

    def plan(
        self, groups: list[list[Match]], single: list[Match]
    ) -> tuple[list[list[Match]], list[Match]]:
        """Measure all sizes at once, and decide what is affordable.

        Args:
            groups: matches that can be computed as one; their weights are then copied.
            single: matches that are computed alone.

        Returns:
            The groups to compute as one, and the matches to compute alone. A group is split where
            that is quicker or where joining exceeds the bound. Its matches are then computed alone,
            or left to PyTorch if they read a matrix, since a call would then save nothing.
        """
        table = self._table(groups, single)
        if self.bound is None:
            self.seconds_per_byte = _seconds_per_byte([*groups, *([m] for m in single)], table)
            return groups, single
        units = [self._together(group, table) for group in groups]
        by_weight: dict[Node, list[Match]] = {}
        for match in single:
            by_weight.setdefault(match.weight, []).append(match)
        units += [self._alone(matches, table) for matches in by_weight.values()]
        chosen, left = spend([unit.options for unit in units], self.bound)
        kept, apart = [], list(single)
        for unit, option in zip(units, chosen, strict=True):
            # Memory that is left allows more algorithms, for sizes that are not known yet.
            whole = next((other for other in unit.options if other.together), option)
            if not option.together and whole.size - option.size <= left:
                option, left = whole, left - (whole.size - option.size)
            names = {"plain", option.name}
            for other in unit.options:
                fits = other.together == option.together and other.size <= left
                if fits and other.name not in names:
                    names.add(other.name)
                    left -= other.size
            allowed = tuple(name for name in self.names if name in names)
            if option.together:
                kept.append(unit.matches)
                self._allowed[tuple(m.weight for m in unit.matches)] = allowed
                continue
            for match in unit.matches:
                self._allowed[(match.weight,)] = allowed
            if unit.group and not _reads_matrix(unit.matches[0]):
                apart += unit.matches
        return kept, apart

    def _table(self, groups: list[list[Match]], single: list[Match]) -> Table:
        wanted = [[m] for m in single] + groups
        if self.bound is not None:
            wanted += [[m] for group in groups for m in group]
        sizes = list(dict.fromkeys(_sizes(ms) for ms in wanted if not _reads_matrix(ms[0])))
        return dict(zip(sizes, estimates(sizes, self.names, self.measured), strict=True))

    def _alone(self, matches: list[Match], table: Table) -> _Unit:
        """The ways to compute convolutions that share one weight."""
        sizes = [_sizes([match]) for match in matches]
        options = []
        for name in self.names:
            names = [size.among(("plain", name)) for size in sizes]
            if name == "plain" or any(name in allowed for allowed in names):
                seconds = sum(
                    min(cost(table[size], n, size.dtype) for n in allowed)
                    for size, allowed in zip(sizes, names, strict=True)
                )
                options.append(Option(packed_bytes(name, sizes[0].spec), seconds, name))
        return _Unit(matches, options, group=False)

    def _together(self, group: list[Match], table: Table) -> _Unit:
        """The ways to compute linear layers of one input: with joined or separate weights."""
        weights = [value(match.weight) for match in group]
        copied = sum(w.nbytes for w in weights if w is not None)
        whole = _sizes(group)
        if _reads_matrix(group[0]):
            size = copied + packed_bytes(product(whole.spec, whole.dtype), whole.spec)
            options = [
                Option(0, len(group) * CALL_OVERHEAD_SECONDS),
                Option(size, CALL_OVERHEAD_SECONDS, together=True),
            ]
            return _Unit(group, options, group=True)
        names = whole.among(self.names)  # the same names suit each match alone
        options = [
            Option(
                sum(packed_bytes(name, match.spec) for match in group),
                sum(
                    cost(table[_sizes([m])], name, whole.dtype) + CALL_OVERHEAD_SECONDS
                    for m in group
                ),
                name,
            )
            for name in names
        ]
        for name in names[1:]:
            size = copied + packed_bytes(name, whole.spec)
            seconds = cost(table[whole], name, whole.dtype) + CALL_OVERHEAD_SECONDS
            options.append(Option(size, seconds, name, together=True))
        return _Unit(group, options, group=True)


def spend(options: Sequence[Sequence[Option]], bound: int) -> tuple[list[Option], int]:
    """Choose one option of each row, of at most ``bound`` bytes in total.

    Greedy: of the changes that fit, the one that saves the most seconds per byte comes first. With
    a larger bound the bytes spent are never fewer.

    Args:
        options: rows of options, of which the first takes 0 bytes.
        bound: bytes.

    Returns:
        The chosen option of each row, and the bytes that are left.
    """
    chosen, left = [0] * len(options), bound
    heap: list[tuple[float, int, int, int]] = []

    def consider(i: int) -> None:
        row, now = options[i], options[i][chosen[i]]
        for j, other in enumerate(row):
            saved, size = now.seconds - other.seconds, other.size - now.size
            if saved > 0:
                heapq.heappush(heap, (-saved / max(size, 1), i, j, chosen[i]))

    for i in range(len(options)):
        consider(i)
    while heap:
        _, i, j, since = heapq.heappop(heap)
        size = options[i][j].size - options[i][chosen[i]].size
        if since == chosen[i] and size <= left:
            chosen[i], left = j, left - size
            consider(i)
    return [row[j] for row, j in zip(options, chosen, strict=True)], left


def _seconds_per_byte(units: Sequence[list[Match]], table: Table) -> float:
    """How many seconds a byte of packed weight must save."""
    seconds, packed = 0.0, 0
    weights: dict[Node, int] = {}
    for unit in units:
        if _reads_matrix(unit[0]):
            continue
        size = _sizes(unit)
        row = table[size]
        quickest = min(row, key=lambda name: cost(row, name, size.dtype))
        seconds += cost(row, quickest, size.dtype)
        packed += packed_bytes(quickest, size.spec)
        for match in unit:
            weight = value(match.weight)
            assert weight is not None
            weights[match.weight] = weight.nbytes
    return MEMORY_SHARE * seconds / sum(weights.values()) if packed > FREE_BYTES else 0.0


def _reads_matrix(match: Match) -> bool:
    """Whether a match reads a matrix [N, C]: it becomes part of a ``calls.Product`` or is left."""
    return match.x.form[0] == 2


def _sizes(matches: Sequence[Match]) -> Sizes:
    """The sizes of matches computed as one convolution, from the graph's example values."""
    match, (ndim, channel) = matches[0], matches[0].x.form
    x, spec = value(match.x.node), joined(matches)
    assert x is not None
    sides = [_hint(x.shape[d]) for d in range(1, ndim) if d != channel]
    return Sizes(
        (_hint(x.shape[0]), spec.channels, *sides, *[1] * (2 - len(sides))),
        spec,
        match.dtype,
        torch.get_num_threads(),
    )


def _hint(size: Any) -> int:
    example = size if isinstance(size, int) else size.node.hint
    return DEFAULT_DIMENSION if example is None else max(int(example), 1)
