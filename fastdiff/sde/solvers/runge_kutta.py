"""Embedded explicit Runge-Kutta methods in which every sample has a step size of its own.

Images of one batch need different numbers of steps: with one step size for all, the hardest decides
for everyone. Here each sample takes its own steps, and those that have arrived leave the batch, so
that the field is only ever evaluated where it is needed. A sample's steps do not depend on the rest
of its batch.

Step sizes and times are float64 and live on the CPU: a step waits for the device once, for its
errors. Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I (2nd ed., 1993), section
II.4, and Hairer & Wanner, volume II, section IV.2, for the PI controller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.common.checks import beside, check_floating, check_like, wide_dtype
from fastdiff.common.errors import StuckError
from fastdiff.common.progress import progress_bar
from fastdiff.sde.solvers.rounding import (
    MAX_EVALUATIONS,
    RoundingWatch,
    rounded_otherwise,
    tolerance_for,
)

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tableau:
    """An explicit method and the error estimate that is embedded in it.

    Attributes:
        order: of the solution that is carried on; the estimate's is one less.
        nodes: c_i, [S].
        matrix: the rows of a_ij below the diagonal, S of them.
        weights: b_i, [S].
        error: b_i minus the weights of the embedded method, [S].
    """

    order: int
    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error: tuple[float, ...]

    @property
    def reuses_last(self) -> bool:
        """Whether the last stage is the next step's first (FSAL)."""
        return self.matrix[-1] == self.weights[:-1] and self.weights[-1] == 0


METHODS = {
    "heun21": Tableau(
        order=2, nodes=(0, 1), matrix=((), (1,)), weights=(1 / 2, 1 / 2), error=(-1 / 2, 1 / 2)
    ),
    # Bogacki & Shampine 1989
    "bosh3": Tableau(
        order=3,
        nodes=(0, 1 / 2, 3 / 4, 1),
        matrix=((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        weights=(2 / 9, 1 / 3, 4 / 9, 0),
        error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    ),
    # Dormand & Prince 1980
    "dopri5": Tableau(
        order=5,
        nodes=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
        matrix=(
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        weights=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
        error=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    ),
}


@dataclass(frozen=True)
class Integrated:
    """Where samples have arrived, and what it took; the counts are int64 [N] on the CPU.

    Attributes:
        x: the states [N, ...].
        evaluations: of the field, or the score.
        accepted: steps taken.
        rejected: steps thrown away because their error was too large.
    """

    x: Tensor
    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor


def rms(scaled: Tensor) -> Tensor:
    """Root mean square over a sample, float64 [N]: Hairer, Norsett & Wanner I, eq. II.4.11."""
    return scaled.flatten(1).double().square().mean(1).sqrt()


@torch.no_grad()
def integrate(
    field: Field,
    x: Tensor,
    t0: float,
    t1: float,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    method: str = "dopri5",
    max_evaluations: int = MAX_EVALUATIONS,
    norm: Norm = rms,
    dtype: torch.dtype | None = None,
    time: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> Integrated:
    """Solve dx/dt = field(x, t) from t0 to t1, which may lie before t0. No gradients are kept.

    Warns once if steps are kept short because the field's rounding is larger than the tolerance.

    Args:
        field: ``(x [M, ...], t float64 [M], index int64 [M])`` -> a tensor like x, called with the
            M samples that are still on their way; ``index`` is their place in the batch.
        x: states at t0, [N, ...], floating point. The solver keeps them in float32 or better and
            hands them to the field, and back, in their dtype.
        t0: where to begin.
        t1: where to end.
        rtol: relative tolerance of a step's error, against the larger of the states at its ends;
            None for what suits the dtype of x: 1e-5 in float64, 1e-4 in float32, 1e-3 in float16,
            1e-2 in bfloat16.
        atol: absolute tolerance, added to it; None likewise.
        method: "dopri5" (5(4), the default), "bosh3" (3(2)) or "heun21" (2(1)).
        max_evaluations: of the field, for any one sample.
        norm: what makes one number [M] of a sample's error over its tolerance [M, ...]; a step
            is good where it is at most 1.
        dtype: in which the field computes where that is coarser than that of ``x``, None for x's.
        time: what messages call t, of positions [M] that stand for it; None is t itself.
        progress: show a bar.

    Raises:
        TypeError: ``x`` or what the field returns is of a wrong dtype.
        ValueError: an unknown method, a tolerance that is not positive (``rtol`` may be 0), times
            that are not finite, or a field of another shape than x.
        FloatingPointError: the field is not finite.
        StuckError: a step too small for float64, or ``max_evaluations`` used up.
    """
    check_floating(x, "x")
    dtype = x.dtype if dtype is None else dtype
    usual = tolerance_for(x, dtype)
    rtol, atol = usual if rtol is None else rtol, usual if atol is None else atol
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, wanted one of {', '.join(METHODS)}")
    if not (0 < atol < math.inf and 0 <= rtol < math.inf):
        raise ValueError(f"wanted atol > 0 and rtol >= 0, got atol {atol} and rtol {rtol}")
    if not (math.isfinite(t0) and math.isfinite(t1)):
        raise ValueError(f"t0 and t1 must be finite, got {t0} and {t1}")
    if max_evaluations < 1:
        raise ValueError(f"max_evaluations must be positive, got {max_evaluations}")
    run = _Run(
        field, x, t0, t1, rtol, atol, method, max_evaluations, norm, dtype,
        (lambda t: t) if time is None else time,
    )  # fmt: skip
    if t0 != t1 and len(x):
        run.begin()
        with travel_bar(len(x), progress) as bar:
            while len(run.index):
                bar.update(min(run.step(), bar.total - bar.n))  # but for rounding
    return Integrated(run.arrived.to(x.dtype), *run.counts.unbind())


def travel_bar(samples: int, shown: bool) -> tqdm:
    """A bar that counts arrived samples, and those under way by the share of time they have left
    behind."""
    layout = "{l_bar}{bar}| {n:.1f}/{total:.0f} [{elapsed}<{remaining}]"
    return progress_bar(total=samples, bar_format=layout, leave=False, shown=shown)


def lost(position: Tensor) -> Tensor:
    """The largest step that is lost in the rounding of a position, which is float64."""
    return 4 * torch.finfo(torch.float64).eps * position.abs()


def refuse_stuck(
    index: Tensor, t: Tensor, tiny: Tensor, h: Tensor, spent: Tensor, setting: str
) -> None:
    """StuckError where a step h at time t is ``tiny``, or evaluations are ``spent``."""
    for stuck, why in (
        (tiny, "its step size has become too small"),
        (spent, "it has used up max_evaluations"),
    ):
        if bool(stuck.any()):
            row = int(stuck.nonzero()[0])
            raise StuckError(
                f"sample {int(index[row])} is stuck at t = {t[row].item():g}: {why} "
                f"(step {h[row].item():.3g}, {setting}); take larger tolerances, or a network and "
                "images in a wider dtype, if its rounding is larger"
            )


@dataclass
class _Run:
    """The samples still on their way: everything is [M, ...] but ``arrived`` and ``counts``."""

    field: Field
    x: Tensor
    t0: float
    t1: float
    rtol: float
    atol: float
    method: str
    max_evaluations: int
    norm: Norm
    computed_in: torch.dtype
    time: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        self.tableau, self.dtype = METHODS[self.method], self.x.dtype
        self.span, self.sign = abs(self.t1 - self.t0), 1.0 if self.t1 > self.t0 else -1.0
        self.x = self.x.to(wide_dtype(self.dtype))
        self.arrived = self.x.clone()
        self.counts = torch.zeros(3, len(self.x), dtype=torch.int64, device="cpu")
        self.index = torch.arange(len(self.x), device="cpu")
        self.t = torch.full((len(self.x),), self.t0, dtype=torch.float64, device="cpu")
        self.previous = torch.full_like(self.t, 1e-4)  # error of the last good step
        # Whether the last step was rejected.
        self.failed = torch.zeros(len(self.x), dtype=torch.bool, device="cpu")
        self.setting = f"{self.method}, rtol {self.rtol:g}, atol {self.atol:g}"
        self.rounding = RoundingWatch(self.computed_in, self.setting)

    def begin(self) -> None:
        """First slopes and step sizes (Hairer, Norsett & Wanner I, II.4, "starting step size")."""
        self.first = self.ask(self.x, self.t, self.index)
        scale = self.atol + self.rtol * self.x.abs()
        size, slope = self.norm(self.x / scale).cpu(), self.norm(self.first / scale).cpu()
        self.refuse_nonfinite(slope, [self.first], [self.t])
        guess = torch.where((size < 1e-5) | (slope < 1e-5), 1e-6 * self.span, 0.01 * size / slope)
        guess = guess.clamp(max=self.span)
        ahead = self.x + beside(self.sign * guess, self.x) * self.first
        t = self.after(guess)
        change = self.ask(ahead, t, self.index)
        curve = self.norm((change - self.first) / scale).cpu() / guess
        self.refuse_nonfinite(curve, [change], [t])
        steepest = torch.maximum(slope, curve)
        wanted = torch.where(
            steepest <= 1e-15,
            (1e-3 * guess).clamp(min=1e-6 * self.span),
            (0.01 / steepest) ** (1 / self.tableau.order),
        )
        self.h = torch.minimum(100 * guess, wanted).clamp(max=self.span)

    def step(self) -> float:
        """Try a step with every sample; returns how much nearer they are, in samples."""
        left = (self.t1 - self.t).abs()
        last = 1.01 * self.h >= left  # no crumb is left for a last step
        h = torch.where(last, left, self.h)
        used = self.counts[0, self.index] + len(self.tableau.nodes) - 1
        refuse_stuck(
            self.index, self.time(self.t), h <= lost(self.t), h, used > self.max_evaluations,
            self.setting,
        )  # fmt: skip
        x, scaled, error, at = self.stages(h)
        good = error <= 1
        self.counts[1, self.index] += good
        self.counts[2, self.index] += ~good
        if self.rounding.is_due(self.counts[0, self.index]):
            self.look_at_rounding(h, scaled, error)
        self.control(h, error, good)
        moved = good.to(self.x.device).view(-1, *[1] * (x.ndim - 1))
        self.x = torch.where(moved, x, self.x)
        self.t = torch.where(good, torch.where(last, self.t1, self.after(h)), self.t)
        if self.tableau.reuses_last:
            self.first = torch.where(moved, at, self.first)
        arrived = good & last
        if bool(arrived.any()):
            self.drop(arrived)
        if not self.tableau.reuses_last:
            self.renew(good[~arrived])
        return float((h * good).sum()) / self.span

    def stages(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """New states, their errors over their tolerance, the norms of these on the CPU, and the
        last stage's slopes."""
        slopes, times = [self.first], [self.t]
        for row, node in zip(self.tableau.matrix[1:], self.tableau.nodes[1:], strict=True):
            times.append(self.after(node * h))
            x = self.x + self.combine(row, slopes, h)
            slopes.append(self.ask(x, times[-1], self.index))
        if not self.tableau.reuses_last:
            x = self.x + self.combine(self.tableau.weights, slopes, h)
        scale = self.atol + self.rtol * torch.maximum(self.x.abs(), x.abs())
        scaled = self.combine(self.tableau.error, slopes, h) / scale
        error = self.norm(scaled).cpu()
        self.refuse_nonfinite(error, slopes, times)
        return x, scaled, error, slopes[-1]

    def look_at_rounding(self, h: Tensor, scaled: Tensor, error: Tensor) -> None:
        """Try the step again from states that are rounded otherwise, and compare the errors."""
        x, first = self.x, self.first
        self.x = rounded_otherwise(x, self.computed_in)
        self.first = self.ask(self.x, self.t, self.index)
        _, again, _, _ = self.stages(h)
        self.x, self.first = x, first
        change = self.norm(again - scaled).cpu()
        self.rounding.compare(error, change, self.index, self.time(self.t), h)

    def control(self, h: Tensor, error: Tensor, good: Tensor) -> None:
        """The next step sizes. The exponents are those of DOPRI5 (beta = 0.04 at order 5); after a
        rejection the memory of earlier errors is left out, and the step may not grow at once."""
        beta = 0.2 / self.tableau.order
        alpha = 1 / self.tableau.order - 0.75 * beta
        factor = 0.9 * error.clamp(min=1e-10) ** -alpha
        factor = torch.where(good, factor * self.previous**beta, factor)
        most = torch.where(good & ~self.failed, 10.0, 1.0)
        self.h = h * torch.minimum(factor.clamp(min=0.2), most)
        self.previous = torch.where(good, error.clamp(min=1e-4), self.previous)
        self.failed = ~good

    def drop(self, arrived: Tensor) -> None:
        """Let samples leave the batch."""
        device = self.x.device
        leaving, staying = arrived.nonzero().flatten(), (~arrived).nonzero().flatten()
        self.arrived[self.index[leaving].to(device)] = self.x[leaving.to(device)]
        self.x, self.first = self.x[staying.to(device)], self.first[staying.to(device)]
        self.t, self.h, self.index = self.t[staying], self.h[staying], self.index[staying]
        self.previous, self.failed = self.previous[staying], self.failed[staying]

    def renew(self, moved: Tensor) -> None:
        """Slopes at the states of samples that have moved."""
        rows = moved.nonzero().flatten()
        if len(rows):
            on_device = rows.to(self.x.device)
            self.first[on_device] = self.ask(self.x[on_device], self.t[rows], self.index[rows])

    def ask(self, x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        """The field, counted and checked, in the solver's dtype."""
        self.counts[0, index] += 1
        x = x.to(self.dtype)
        slope = self.field(x, t.to(x.device), index.to(x.device))
        check_like(slope, x, "what the field returns", "x")
        return slope.to(self.x.dtype)

    def after(self, h: Tensor) -> Tensor:
        """Times h later, never outside t0..t1, where the field may not be defined."""
        low, high = sorted((self.t0, self.t1))
        return (self.t + self.sign * h).clamp(low, high)

    def combine(self, weights: tuple[float, ...], slopes: list[Tensor], h: Tensor) -> Tensor:
        """h times the weighted sum of the slopes."""
        pairs = [(w, k) for w, k in zip(weights, slopes, strict=False) if w]
        total = beside(self.sign * pairs[0][0] * h, self.x) * pairs[0][1]
        for weight, slope in pairs[1:]:
            total.addcmul_(beside(self.sign * weight * h, self.x), slope)
        return total

    def refuse_nonfinite(self, error: Tensor, slopes: list[Tensor], times: list[Tensor]) -> None:
        if bool(error.isfinite().all()):
            return
        for slope, t in zip(slopes, times, strict=True):
            bad = (~slope.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            if bad:
                raise FloatingPointError(
                    f"the field of sample {int(self.index[bad[0]])} is not finite at "
                    f"t = {self.time(t)[bad[0]].item():g}"
                )
        row = int((~error.isfinite()).nonzero()[0])
        raise FloatingPointError(
            f"sample {int(self.index[row])} overflows at t = {self.time(self.t)[row].item():g}"
        )
