"""The reverse-time SDE with step sizes of its own for every image.

The control of Jolicoeur-Martineau et al. 2021, "Gotta go fast when generating data with score-based
models", arXiv:2105.14080, algorithm 1, with two things mended. What a rejected step has learnt of
its Brownian path stays true for the steps that replace it (as in Rackauckas & Nie 2017,
doi:10.3934/dcdsb.2017133); and the steps themselves may be exponential ones, which need one
evaluation in place of two and are fewer: see :mod:`fastdiff.sde.solvers.adaptive_schemes`. Images
that have arrived leave the batch and cost nothing more, as in
:mod:`fastdiff.sde.solvers.runge_kutta`; step sizes and times are float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.common.checks import check_like, wide_dtype
from fastdiff.sde.processes import SDE, VE
from fastdiff.sde.score import Score
from fastdiff.sde.solvers.adaptive_schemes import (
    SCHEMES,
    Attempt,
    Exponential,
    ImprovedEuler,
    State,
)
from fastdiff.sde.solvers.brownian import ROUNDING, Path
from fastdiff.sde.solvers.ode import IndexedScore, score_of_rows
from fastdiff.sde.solvers.rounding import MAX_EVALUATIONS, RoundingWatch, rounded_otherwise
from fastdiff.sde.solvers.runge_kutta import Integrated, lost, refuse_stuck, rms, travel_bar
from fastdiff.sde.solvers.stepping import check_count, check_images, check_known, check_positive

NORMS = ("l2", "linf")


@torch.no_grad()
def solve_adaptive(
    score: Score | IndexedScore,
    sde: SDE,
    x_T: Tensor,
    *,
    scheme: str = "exponential",
    eps_rel: float | None = None,
    eps_abs: float | None = None,
    h_init: float | None = None,
    h_max: float | None = None,
    norm: str = "l2",
    generator: torch.Generator | None = None,
    denoise: bool = True,
    redraw: bool = False,
    max_evaluations: int = MAX_EVALUATIONS,
    conditioned: bool = False,
    progress: bool = True,
) -> Integrated:
    """Draw images by the reverse-time SDE, from ``sde.end`` to ``sde.smallest``.

    A step is taken in two orders with the same noise; their difference is its error, and the higher
    one is kept. The paper tries a rejected step again with new noise. That prefers the noise of
    easy steps, and images spread too far: with the paper's steps those of a mixture of two
    Gaussians in 2 dimensions have a deviation 5 to 30% too large, at any tolerance; in 256
    dimensions nothing is to be seen of it. Here the shorter step gets its part of the same path,
    for a fifth more evaluations and memory for one more batch of images or a few.

    Warns once if steps are kept short because the score's rounding is larger than the tolerance.

    Args:
        score: ``(x [M, ...], t float64 [M])`` -> grad log p_t(x), like x.
        sde: the forward process.
        x_T: noise of the prior, [N, ...], floating point. The solver keeps images in float32 or
            better and hands them to the score, and back, in their dtype.
        scheme: "exponential", one evaluation a step, or the paper's "improved-euler", two.
        eps_rel: relative tolerance, against the larger of the lower order's images before and after
            the step; by default 0.1 with "exponential" and 0.05 with "improved-euler", for which
            the paper has 0.01, 0.02, 0.05 and 0.1, ever faster.
        eps_abs: absolute tolerance; by default one of 256 levels, 2 / 256 for images in [-1, 1]
            and 1 / 256 with ``VE``, whose images are in [0, 1].
        h_init: the first step size: with "exponential" a change of log(alpha / sigma), by default
            0.3, with "improved-euler" of time, by default a hundredth of it all.
        h_max: the largest, likewise; by default 0.85, or no limit.
        norm: of an image's error over its tolerance: "l2", the root mean square, or "linf", the
            largest, several times slower.
        generator: source of the noise; it depends on the whole batch.
        denoise: end with the mean of x_0 given x at the smallest time (Tweedie's formula), which
            takes "improved-euler" one more evaluation; the other knows that of its last prediction.
        redraw: draw new noise after a rejection, as the paper does.
        max_evaluations: of the score, for any one image.
        conditioned: as in :func:`fastdiff.sde.solvers.ode.solve_ode`.
        progress: show a bar.

    Raises:
        TypeError: ``x_T`` is not floating point, or what the score returns not of its dtype.
        ValueError: an unknown scheme or norm, tolerances or step sizes that are not positive, or a
            score of another shape than x.
        FloatingPointError: the score is not finite.
        StuckError: a step too small for float64, or ``max_evaluations`` used up.
    """
    check_images(x_T, "x_T")
    check_known(scheme, SCHEMES, "scheme")
    check_known(norm, NORMS, "norm")
    steps = SCHEMES[scheme](sde)
    eps_rel = steps.eps_rel if eps_rel is None else eps_rel
    if eps_abs is None:
        eps_abs = 1 / 256 if isinstance(sde, VE) else 2 / 256
    h_init = steps.h_init if h_init is None else h_init
    h_max = steps.h_max if h_max is None else h_max
    for value, name in ((eps_rel, "eps_rel"), (eps_abs, "eps_abs"), (h_init, "h_init")):
        check_positive(value, name)
    if not h_max > 0:
        raise ValueError(f"h_max must be positive, got {h_max}")
    check_count(max_evaluations, "max_evaluations")
    run = _Run(
        score, steps, x_T, eps_rel, eps_abs, h_max, norm, generator, redraw, max_evaluations,
        conditioned,
    )  # fmt: skip
    if len(x_T):
        run.begin(h_init)
    with travel_bar(len(x_T), progress) as bar:
        while len(run.index):
            bar.update(min(run.step(), bar.total - bar.n))  # but for rounding
    x = run.denoised() if denoise and len(x_T) else run.arrived
    return Integrated(x.to(x_T.dtype), *run.counts.unbind())


@dataclass
class _Run:
    """The images still on their way: everything is [M, ...] but ``arrived`` and ``counts``."""

    score: Score | IndexedScore
    steps: Exponential | ImprovedEuler
    x: Tensor
    eps_rel: float
    eps_abs: float
    h_max: float
    norm: str
    generator: torch.Generator | None
    redraw: bool
    max_evaluations: int
    conditioned: bool

    def __post_init__(self) -> None:
        self.dtype, self.span = self.x.dtype, self.steps.last - self.steps.first
        self.x = self.x.to(wide_dtype(self.dtype))
        self.before = self.x  # the lower order's images after the last good step
        self.arrived = self.x.clone()
        self.counts = torch.zeros(3, len(self.x), dtype=torch.int64, device="cpu")
        self.index = torch.arange(len(self.x), device="cpu")
        self.position = torch.full(
            (len(self.x),), self.steps.first, dtype=torch.float64, device="cpu"
        )
        self.h = torch.empty_like(self.position)  # wanted next
        self.state: State = ()
        self.ended: State = ()  # the state of those that have arrived
        self.path = Path(self.x, self.generator)
        self.setting = f"eps_rel {self.eps_rel:g}, eps_abs {self.eps_abs:g}"
        self.rounding = RoundingWatch(self.dtype, self.setting)

    def begin(self, h_init: float) -> None:
        """What precedes the first step."""
        self.h.fill_(h_init)
        self.state = self.steps.begin(self.x, self.ask)
        self.ended = tuple(torch.empty_like(value) for value in self.state)

    def step(self) -> float:
        """Try a step with every image; returns how much nearer they are, in images."""
        wanted = self.h.clamp(max=self.h_max)
        left = self.steps.last - self.position
        last = wanted >= left - ROUNDING * self.span  # no crumb is left for a last step
        stop = torch.where(last, self.steps.last, self.position + wanted)
        h = stop - self.position
        spent = self.counts[0, self.index] + self.steps.cost > self.max_evaluations
        refuse_stuck(
            self.index, self.steps.time(self.position), h <= lost(self.position), h, spent,
            self.setting,
        )  # fmt: skip
        noise = self.path.increment(self.steps.clock(self.position, h))
        tried = self.steps.attempt(self.x, self.state, self.position, stop, noise, self.ask)
        scaled = self.scaled(tried)
        error = self.size(scaled)
        good = error <= 1
        self.counts[1, self.index] += good
        self.counts[2, self.index] += ~good
        if self.rounding.is_due(self.counts[0, self.index]):
            self.look_at_rounding(stop, noise, scaled, error)
        self.x, self.before = _kept(good, tried.high, self.x), _kept(good, tried.low, self.before)
        self.state = tuple(
            _kept(good, new, old) for new, old in zip(tried.state, self.state, strict=True)
        )
        # Also for a step that the end has cut short: if it is good, none follows.
        factor = self.steps.safety * error**-self.steps.exponent
        self.h = h * factor.clamp(max=self.steps.growth)
        self.position = torch.where(good, stop, self.position)
        if self.redraw:
            self.path = Path(self.x, self.generator)
        self.path.go(good)
        arrived = good & last
        if bool(arrived.any()):
            self.drop(arrived)
        return float((h * good).sum()) / self.span

    def look_at_rounding(self, stop: Tensor, noise: Tensor, scaled: Tensor, error: Tensor) -> None:
        """Try the step again from images that are rounded otherwise, and compare the errors."""
        x = rounded_otherwise(self.x, self.dtype)
        again = self.steps.attempt(x, self.state, self.position, stop, noise, self.ask)
        change = self.size(self.scaled(again) - scaled)
        self.rounding.compare(
            error, change, self.index, self.steps.time(self.position), stop - self.position
        )

    def scaled(self, tried: Attempt) -> Tensor:
        """The errors over their tolerance, like x."""
        allowed = torch.maximum(tried.low.abs(), self.before.abs()).mul_(self.eps_rel)
        return (tried.high - tried.low) / allowed.clamp_(min=self.eps_abs)

    def size(self, scaled: Tensor) -> Tensor:
        """One number for the error of each image, on the CPU."""
        if self.norm == "l2":
            return rms(scaled).cpu()
        return scaled.flatten(1).abs().amax(1).double().cpu()

    def ask(self, x: Tensor, t: Tensor) -> Tensor:
        """The score of the images under way, checked, in the dtype of the solver's."""
        self.counts[0, self.index] += 1
        score = score_of_rows(self.score, self.conditioned, self.index.to(x.device))
        given = x.to(self.dtype)
        found = score(given, t.to(x.device))
        check_like(found, given, "the score", "x")
        finite = found.isfinite().flatten(1).all(1).cpu()
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise FloatingPointError(
                f"the score of sample {int(self.index[row])} is not finite at t = {t[row].item():g}"
            )
        return found.to(x.dtype)

    def denoised(self) -> Tensor:
        """The mean of x_0 given all images, which have arrived."""
        self.index = torch.arange(len(self.arrived), device="cpu")
        return self.steps.denoised(self.arrived, self.ended, self.ask)

    def drop(self, arrived: Tensor) -> None:
        """Let images leave the batch."""
        device = self.x.device
        leaving, staying = arrived.nonzero().flatten(), (~arrived).nonzero().flatten()
        rows, places = staying.to(device), self.index[leaving].to(device)
        self.arrived[places] = self.x[leaving.to(device)]
        for kept, value in zip(self.ended, self.state, strict=True):
            kept[places] = value[leaving.to(device)]
        self.x, self.before = self.x[rows], self.before[rows]
        self.state = tuple(value[rows] for value in self.state)
        self.position, self.h, self.index = (
            value[staying] for value in (self.position, self.h, self.index)
        )
        self.path.keep(staying)


def _kept(good: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(good.to(new.device).view(-1, *[1] * (new.ndim - 1)), new, old)
