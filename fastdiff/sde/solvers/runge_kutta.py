"""Embedded explicit Runge-Kutta methods with a step size for every sample.

Images of one batch need different numbers of steps: with one step size for all, the hardest image
sets it. Here each sample takes its own steps, and finished samples leave the batch, so that the
field is evaluated only where it is needed. A sample's steps do not depend on the rest of its batch.

Step sizes and times are float64 on the CPU: a step waits for the device once, for its errors. The
methods are those of Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I (2nd ed.,
1993), section II.4; the PI controller is from Hairer & Wanner, volume II, section IV.2.
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
    rounded_differently,
    tolerance_for,
)

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tableau:
    """An explicit method of S stages with an embedded method for the error estimate.

    Attributes:
        order: order of the method whose solution is kept; the embedded method has one less.
        nodes: c_i, [S].
        matrix: S rows of a_ij, row i with its entries below the diagonal.
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
        """Whether the last stage is the first stage of the next step (FSAL)."""
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
    """The final states and their cost; counts are int64 [N] on the CPU.

    Attributes:
        x: the states [N, ...].
        evaluations: number of evaluations of the field or the score.
        accepted: number of accepted steps.
        rejected: number of steps rejected because their error was too large.
    """

    x: Tensor
    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor


def rms(scaled: Tensor) -> Tensor:
    """Root mean square of each sample, float64 [N] (Hairer, Norsett & Wanner I, eq. II.4.11)."""
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
    """Solve dx/dt = field(x, t) from t0 to t1, which may be before t0, without gradients.

    Warns once if steps are kept short because the field's rounding is larger than the tolerance.

    Args:
        field: ``(x [M, ...], t float64 [M], index int64 [M])`` -> a tensor like x, called with the
            M samples that have not arrived; ``index`` has their numbers in the batch.
        x: states at t0, [N, ...], floating point. The solver computes in float32 or float64; the
            field gets states of x's dtype and must return that dtype.
        t0: the time of ``x``.
        t1: the time of the result.
        rtol: tolerance of a step's error relative to the larger of the states at its ends. None
            depends on the dtype of x: 1e-5 for float64, 1e-4 for float32, 1e-3 for float16, 1e-2
            for bfloat16.
        atol: absolute tolerance, added to the relative one; None as for ``rtol``.
        method: "dopri5" (5(4), the default), "bosh3" (3(2)) or "heun21" (2(1)).
        max_evaluations: limit of field evaluations for any one sample.
        norm: a function from errors over their tolerances [M, ...] to one number per sample [M]; a
            step is accepted if the number is at most 1.
        dtype: the dtype that the field computes in, if it is coarser than x's; None for x's.
        time: a function from values [M] of the integration variable to the times that messages
            show; None if the variable is the time.
        progress: show a progress bar on standard error.

    Returns:
        The states at t1, like ``x``, with the numbers of evaluations and steps.

    Raises:
        TypeError: ``x`` is not floating point, or the field returns another dtype.
        ValueError: an unknown method, a tolerance that is not positive (``rtol`` may be 0), times
            that are not finite, or a field of another shape than x.
        FloatingPointError: the field is not finite.
        StuckError: a step is too small for float64, or needs more than ``max_evaluations``.
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
        with arrival_bar(len(x), progress) as bar:
            while len(run.index):
                bar.update(min(run.step(), bar.total - bar.n))  # rounding may exceed the total
    return Integrated(run.arrived.to(x.dtype), *run.counts.unbind())


def arrival_bar(samples: int, shown: bool) -> tqdm:
    """A progress bar in samples; a sample counts as the share of its way that it has covered."""
    layout = "{l_bar}{bar}| {n:.1f}/{total:.0f} [{elapsed}<{remaining}]"
    return progress_bar(total=samples, bar_format=layout, leave=False, shown=shown)


def smallest_step(position: Tensor) -> Tensor:
    """The step size at which rounding of a float64 position takes over; steps must be larger."""
    return 4 * torch.finfo(torch.float64).eps * position.abs()


def raise_if_stuck(
    index: Tensor, t: Tensor, tiny: Tensor, h: Tensor, spent: Tensor, setting: str
) -> None:
    """Raise StuckError if any sample cannot go on; all tensors are [M].

    Args:
        index: number of each sample in its batch.
        t: time of each sample.
        tiny: whether its step is too small for float64.
        h: its step size.
        spent: whether it has used up its evaluations.
        setting: description of the tolerances, for the message.
    """
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
    """The M samples still in the batch. ``arrived`` and ``counts`` are of all N samples.

    ``index`` [M] has the samples' numbers among the N.
    """

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
        self.previous = torch.full_like(self.t, 1e-4)  # error of the last accepted step
        # Whether the last step was rejected.
        self.failed = torch.zeros(len(self.x), dtype=torch.bool, device="cpu")
        self.setting = f"{self.method}, rtol {self.rtol:g}, atol {self.atol:g}"
        self.rounding = RoundingWatch(self.computed_in, self.setting)

    def begin(self) -> None:
        """Set the first slopes and step sizes.

        Hairer, Norsett & Wanner I, II.4, "starting step size".
        """
        self.first = self.evaluate(self.x, self.t, self.index)
        scale = self.atol + self.rtol * self.x.abs()
        size, slope = self.norm(self.x / scale).cpu(), self.norm(self.first / scale).cpu()
        self.refuse_nonfinite(slope, [self.first], [self.t])
        guess = torch.where((size < 1e-5) | (slope < 1e-5), 1e-6 * self.span, 0.01 * size / slope)
        guess = guess.clamp(max=self.span)
        ahead = self.x + beside(self.sign * guess, self.x) * self.first
        t = self.after(guess)
        change = self.evaluate(ahead, t, self.index)
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
        """Try a step of every sample; return the sum of the shares of their way that they moved."""
        left = (self.t1 - self.t).abs()
        last = 1.01 * self.h >= left  # leaves no tiny last step
        h = torch.where(last, left, self.h)
        used = self.counts[0, self.index] + len(self.tableau.nodes) - 1
        raise_if_stuck(
            self.index, self.time(self.t), h <= smallest_step(self.t), h,
            used > self.max_evaluations, self.setting,
        )  # fmt: skip
        x, scaled, error, at = self.stages(h)
        good = error <= 1
        self.counts[1, self.index] += good
        self.counts[2, self.index] += ~good
        if self.rounding.is_due(self.counts[0, self.index]):
            self.check_rounding(h, scaled, error)
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
        """Evaluate all stages of a step of h.

        Returns:
            The new states, their errors over their tolerances, the norms of these errors on the
            CPU, and the slopes of the last stage.
        """
        slopes, times = [self.first], [self.t]
        for row, node in zip(self.tableau.matrix[1:], self.tableau.nodes[1:], strict=True):
            times.append(self.after(node * h))
            x = self.x + self.combine(row, slopes, h)
            slopes.append(self.evaluate(x, times[-1], self.index))
        if not self.tableau.reuses_last:
            x = self.x + self.combine(self.tableau.weights, slopes, h)
        scale = self.atol + self.rtol * torch.maximum(self.x.abs(), x.abs())
        scaled = self.combine(self.tableau.error, slopes, h) / scale
        error = self.norm(scaled).cpu()
        self.refuse_nonfinite(error, slopes, times)
        return x, scaled, error, slopes[-1]

    def check_rounding(self, h: Tensor, scaled: Tensor, error: Tensor) -> None:
        """Repeat the step from states that are rounded differently, and compare the errors."""
        x, first = self.x, self.first
        self.x = rounded_differently(x, self.computed_in)
        self.first = self.evaluate(self.x, self.t, self.index)
        _, again, _, _ = self.stages(h)
        self.x, self.first = x, first
        change = self.norm(again - scaled).cpu()
        self.rounding.compare(error, change, self.index, self.time(self.t), h)

    def control(self, h: Tensor, error: Tensor, good: Tensor) -> None:
        """Set the next step sizes by a PI controller.

        The exponents are those of DOPRI5 (beta = 0.04 at order 5). After a rejected step the
        controller ignores the previous error, and the next accepted step does not grow.
        """
        beta = 0.2 / self.tableau.order
        alpha = 1 / self.tableau.order - 0.75 * beta
        factor = 0.9 * error.clamp(min=1e-10) ** -alpha
        factor = torch.where(good, factor * self.previous**beta, factor)
        largest = torch.where(good & ~self.failed, 10.0, 1.0)
        self.h = h * torch.minimum(factor.clamp(min=0.2), largest)
        self.previous = torch.where(good, error.clamp(min=1e-4), self.previous)
        self.failed = ~good

    def drop(self, arrived: Tensor) -> None:
        """Remove samples from the batch, and store them in ``self.arrived``."""
        device = self.x.device
        leaving, staying = arrived.nonzero().flatten(), (~arrived).nonzero().flatten()
        self.arrived[self.index[leaving].to(device)] = self.x[leaving.to(device)]
        self.x, self.first = self.x[staying.to(device)], self.first[staying.to(device)]
        self.t, self.h, self.index = self.t[staying], self.h[staying], self.index[staying]
        self.previous, self.failed = self.previous[staying], self.failed[staying]

    def renew(self, moved: Tensor) -> None:
        """Evaluate the first slopes at the new states of samples that have moved, bool [M]."""
        rows = moved.nonzero().flatten()
        if len(rows):
            on_device = rows.to(self.x.device)
            self.first[on_device] = self.evaluate(self.x[on_device], self.t[rows], self.index[rows])

    def evaluate(self, x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        """The field at x and t, counted and checked, in the solver's dtype."""
        self.counts[0, index] += 1
        x = x.to(self.dtype)
        slope = self.field(x, t.to(x.device), index.to(x.device))
        check_like(slope, x, "what the field returns", "x")
        return slope.to(self.x.dtype)

    def after(self, h: Tensor) -> Tensor:
        """Times h later, clamped to t0..t1, beyond which the field may be undefined."""
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
        """Raise FloatingPointError if an error is not finite, naming the sample and the time."""
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
