"""The base class of samplers: options, the grid, and the conversion of rows to a table.

A sampler is a class with one method, ``rows``. For each evaluation of the model it gives the next x
as a sum of x, the predicted image x0, the predicted noise eps, values kept by earlier rows, and
fresh noise. The base class takes care of prediction kinds, thresholds and history slots.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff import process

# A sampler's module imports from this package alone, and has this check from here.
from fastdiff.common.inputs import check_choice as check_choice
from fastdiff.samplers import grids
from fastdiff.samplers.grids import Point
from fastdiff.samplers.table import COLUMNS, MAX_HISTORY, Table
from fastdiff.schedules import GaussianPath

Clip = tuple[float, float] | None


@dataclass(frozen=True)
class Keep:
    """Coefficients of the sum that a row keeps in the history for later rows."""

    x: float = 0.0
    x0: float = 0.0
    eps: float = 0.0
    noise: float = 0.0


X0, EPS = Keep(x0=1.0), Keep(eps=1.0)


@dataclass(frozen=True)
class Row:
    """One evaluation of the model, and the x that follows from it.

    Attributes:
        step: number of the step that the row belongs to.
        at: the point whose time the model gets.
        x, x0, eps: coefficients of the current x, the predicted image and the predicted noise.
        history: coefficients of the values kept by earlier rows, the latest value first.
        noise, logvar, logvar_v: see ``fastdiff.samplers.table``.
        keep: the sum that the row keeps for later rows; None keeps nothing.
        x0_form: (a, b) of x0 = a x + b output; None for the form that the prediction kind implies.
        level: alpha and sigma of x; None if they are those of ``at``.
    """

    step: int
    at: Point
    x: float = 0.0
    x0: float = 0.0
    eps: float = 0.0
    history: Sequence[float] = ()
    noise: float = 0.0
    logvar: float = 0.0
    logvar_v: float = 0.0
    keep: Keep | None = None
    x0_form: tuple[float, float] | None = None
    level: tuple[float, float] | None = None


class Sampler(ABC):
    """A sampler of the reverse process, as a coefficient table.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        grid: the noise levels to visit: leading, trailing, linspace, uniform, quadratic, karras,
            exponential, polyexponential, logsnr, vp, iddpm, or the timesteps themselves.
            ``samplers.grids.make`` describes them and the options ``offset``, ``final``, ``rho``,
            ``sigma_min``, ``sigma_max`` and ``round_levels``.
        prediction: what the model predicts: eps, x0, v, score or flow.
        clip: limits (low, high) for x0 (static thresholding), or None. With ``dynamic_threshold``,
            high is the largest value that the threshold may take.
        dynamic_threshold: a quantile q in (0, 1], or None for no dynamic thresholding. Each image's
            x0 is clamped to [-s, s] and divided by s, the larger of 1 and the q-quantile of |x0|
            (Imagen, arXiv:2205.11487, section 2.3).

    Attributes:
        name: the name in the registry.
        minimum_steps: the smallest number of steps.
        schedule, prediction: the arguments of these names.
        points: the grid, a list of ``steps`` + 1 points.
        round_levels: whether the model gets whole timesteps only.
        skipped: number of first steps that :meth:`starting_at` has left out.
        table: a :class:`fastdiff.samplers.Table`.

    Raises:
        TypeError: an option that this sampler does not have.
        ValueError: an option outside its range, or a prediction of eps or score where a visited
            timestep has no signal.
    """

    name: str
    minimum_steps: int = 1
    skipped: int = 0
    default_grid: ClassVar[str] = "trailing"
    default_clip: ClassVar[Clip] = None

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int,
        *,
        grid: str | Sequence[float] | Tensor | None = None,
        prediction: str = "eps",
        clip: Clip | str = "default",
        dynamic_threshold: float | None = None,
        **grid_options: Any,
    ) -> None:
        unknown = sorted(set(grid_options) - set(grids.OPTIONS))
        if unknown:
            raise TypeError(f"{self.name} has no option {', '.join(map(repr, unknown))}")
        process.check_kind(prediction)
        if dynamic_threshold is not None and not 0 < dynamic_threshold <= 1:
            raise ValueError(f"dynamic_threshold must lie in (0, 1], got {dynamic_threshold}")
        if isinstance(clip, str):
            if clip != "default":
                raise ValueError(f"clip must be (low, high) or None, got {clip!r}")
            clip = None if dynamic_threshold else self.default_clip
        self.schedule, self.prediction = schedule, prediction
        self.clip = _checked_clip(clip, dynamic_threshold)
        self.dynamic_threshold = dynamic_threshold
        self.round_levels = bool(grid_options.get("round_levels"))
        grid = self.default_grid if grid is None else grid
        self.points = self._points(schedule, steps, grid, grid_options)
        if steps < self.minimum_steps:
            raise ValueError(f"{self.name} needs at least {self.minimum_steps} steps, got {steps}")
        self.table = self._table()

    @abstractmethod
    def rows(self, points: list[Point]) -> Iterable[Row]:
        """The rows of a run through ``points``."""

    @property
    def steps(self) -> int:
        """S, the number of steps."""
        return len(self.points) - 1

    @property
    def timesteps(self) -> Tensor:
        """The model's time in each row, float64 [R]."""
        return self.table.timesteps

    @property
    def learned_variance(self) -> bool:
        """Whether the model returns twice the channels, the second half for the variance."""
        return False

    def starting_at(self, step: int) -> Sampler:
        """The same sampler without its first ``step`` steps, for image-to-image sampling.

        Raises:
            ValueError: ``step`` outside 0..S-1.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"start must lie in 0..{self.steps - 1}, got {step}")
        later = copy.copy(self)
        later.points, later.skipped = self.points[step:], self.skipped + step
        later.table = later._table()
        return later

    def __str__(self) -> str:
        return str(self.table)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.name!r}, {self.steps} steps, "
            f"{self.table.rows} evaluations>"
        )

    def _points(
        self, schedule: GaussianPath, steps: int, grid: Any, options: dict[str, Any]
    ) -> list[Point]:
        return grids.make(schedule, steps, grid, **options)

    @property
    def _eps_follows_x0(self) -> bool:
        """Whether eps is recomputed from x0 after thresholding, so that the two agree."""
        return self.clip is not None or self.dynamic_threshold is not None

    def _table(self) -> Table:
        _check_signal(self.points, self.prediction)
        rows = list(self.rows(self.points))
        reads = _slots(rows)
        depth = 1 + max(slot for _, slot in reads)
        if depth > MAX_HISTORY:
            raise ValueError(f"a history of at most {MAX_HISTORY} is possible, got {depth}")
        alpha, sigma = torch.tensor(
            [(row.at.alpha, row.at.sigma) for row in rows], dtype=torch.float64, device="cpu"
        ).unbind(1)
        x0, eps = process.x0_and_eps(self.prediction, alpha, sigma)
        forms = torch.stack([*x0, *eps], dim=1).tolist()
        values = []
        for row, (history, slot), of_row in zip(rows, reads, forms, strict=True):
            fixed = self._coefficients(row, slot, *of_row)
            values.append(
                [fixed[column] for column in COLUMNS] + [history.get(j, 0.0) for j in range(depth)]
            )
        told = [row.at for row in rows]
        if self.round_levels:  # also of points within steps
            told = [grids.nearest_timestep(self.schedule, at.ratio) for at in told]
        times, of_label = torch.tensor(
            [(at.t, at.sigma) for at in told], dtype=torch.float64, device="cpu"
        ).unbind(1)
        levels = [row.level or (row.at.alpha, row.at.sigma) for row in rows]
        end = self.points[-1]
        return Table(
            name=self.name,
            values=torch.tensor(values, dtype=torch.float64, device="cpu"),
            timesteps=self.schedule.label(times, of_label),
            steps=torch.tensor([row.step for row in rows], device="cpu"),
            levels=torch.tensor(
                [*levels, (end.alpha, end.sigma)], dtype=torch.float64, device="cpu"
            ),
            learned_variance=self.learned_variance,
        )

    def _coefficients(
        self, row: Row, slot: int, x0_x: float, x0_m: float, eps_x: float, eps_m: float
    ) -> dict[str, float]:
        """A row's values by column, without the history.

        Args:
            row: the row.
            slot: the history slot that it writes, -1 for none.
            x0_x, x0_m: coefficients of x0 = x0_x x + x0_m output.
            eps_x, eps_m: coefficients of eps = eps_x x + eps_m output.
        """
        x0_x, x0_m = row.x0_form or (x0_x, x0_m)
        eps_x0 = 0.0
        if self._eps_follows_x0 and row.at.sigma > 0:
            eps_x, eps_x0, eps_m = 1 / row.at.sigma, -row.at.alpha / row.at.sigma, 0.0

        def without_eps(x: float, x0: float, eps: float) -> tuple[float, float, float]:
            """A sum over x, x0 and eps as coefficients of x, x0 and the model's output."""
            if eps == 0:  # eps_x is not finite where sigma is 0
                return x, x0, 0.0
            return x + eps * eps_x, x0 + eps * eps_x0, eps * eps_m

        out = without_eps(row.x, row.x0, row.eps)
        keep = row.keep if slot >= 0 and row.keep else Keep()
        kept = without_eps(keep.x, keep.x0, keep.eps)
        low, high = self.clip or (-torch.inf, torch.inf)
        return {
            "guidance": 1.0, "rescale": 0.0,
            "x0_x": x0_x, "x0_m": x0_m,
            "clip_min": low, "clip_max": high, "quantile": self.dynamic_threshold or 0.0,
            "out_x": out[0], "out_x0": out[1], "out_m": out[2],
            "noise": row.noise, "logvar": row.logvar, "logvar_v": row.logvar_v,
            "keep_x": kept[0], "keep_x0": kept[1], "keep_m": kept[2], "keep_noise": keep.noise,
            "slot": float(slot),
        }  # fmt: skip


def _slots(rows: Sequence[Row]) -> list[tuple[dict[int, float], int]]:
    """Assign history slots: for each row the coefficients by slot, and the slot it writes or -1.

    A value holds its slot until the last row that reads it. A value that no row reads is not kept.
    """
    kept: list[int] = []  # the rows so far that keep a value
    readers: list[dict[int, float]] = []  # for each row, the coefficients by the row that kept
    last: dict[int, int] = {}  # for each row that keeps a value, the last row that reads it
    for r, row in enumerate(rows):
        reads = {}
        for age, value in enumerate(row.history):
            if value != 0:
                reads[kept[-1 - age]] = value
                last[kept[-1 - age]] = r
        readers.append(reads)
        if row.keep is not None:
            kept.append(r)
    holds: dict[int, int] = {}  # the row that kept a value -> its slot
    out: list[tuple[dict[int, float], int]] = []
    for r in range(len(rows)):
        coefficients = {holds[k]: value for k, value in readers[r].items()}
        holds = {k: slot for k, slot in holds.items() if last[k] > r}
        slot = -1
        if r in last:
            slot = next(j for j in range(len(rows)) if j not in holds.values())
            holds[r] = slot
        out.append((coefficients, slot))
    return out


def pairs(points: Sequence[Point]) -> Iterator[tuple[int, Point, Point]]:
    """For every step its number, its start point and its end point."""
    for i in range(len(points) - 1):
        yield i, points[i], points[i + 1]


def combine(*terms: tuple[float, Sequence[float]]) -> list[float]:
    """The sum of (factor, coefficients) terms; missing entries of a shorter list count as 0."""
    length = max(len(values) for _, values in terms)
    return [
        sum(factor * values[j] for factor, values in terms if j < len(values))
        for j in range(length)
    ]


def check_ratios(name: str, points: Sequence[Point]) -> None:
    """ValueError unless sigma / alpha is finite at all points, for methods that compute with it."""
    for at in points:
        if at.alpha == 0:
            raise ValueError(
                f"{name} works with sigma / alpha, which is infinite at t = {at.t:g} of this "
                "schedule (zero terminal SNR): take ddim, euler, unipc or a dpmpp sampler, or a "
                "grid that does not visit this timestep"
            )


def check_share(name: str, value: float) -> None:
    """ValueError unless ``value`` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_amounts(**values: float) -> None:
    """ValueError unless every value is finite and not negative."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative, nor infinite, got {value}")


def _checked_clip(clip: Clip, dynamic_threshold: float | None) -> Clip:
    if clip is None:
        return None
    limits = tuple(clip) if isinstance(clip, Sequence) else ()
    if len(limits) != 2:
        raise ValueError(f"clip must be (low, high) or None, got {clip!r}")
    low, high = limits
    if not low < high:
        raise ValueError(f"clip must be (low, high) with low < high, got {clip}")
    if dynamic_threshold is not None and high < 1:
        raise ValueError(
            f"with dynamic_threshold, clip's upper limit must be at least 1, got {clip}"
        )
    return low, high


def _check_signal(points: Sequence[Point], prediction: str) -> None:
    for at in points:
        if at.alpha == 0 and prediction in ("eps", "score"):
            raise ValueError(
                f"the schedule has zero signal at t = {at.t:g}, where a prediction of {prediction} "
                "says nothing of x0; use a model that predicts x0, v or flow, or a grid that does "
                "not visit this timestep"
            )
