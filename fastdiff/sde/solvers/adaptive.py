"""The reverse-time SDE with an adaptive step size for every image.

Step sizes are controlled as in Jolicoeur-Martineau et al. 2021, "Gotta go fast when generating data
with score-based models", arXiv:2105.14080, algorithm 1, with two changes. The steps that replace a
rejected one follow the same Brownian path (as in Rackauckas & Nie 2017,
doi:10.3934/dcdsb.2017133). And steps may be exponential: they need one evaluation instead of two,
and fewer of them are needed, see :mod:`fastdiff.sde.solvers.adaptive_schemes`. Finished images
leave the batch and cost nothing more, as in :mod:`fastdiff.sde.solvers.runge_kutta`. Step sizes and
times are float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.common.checks import check_like, wide_dtype
from fastdiff.common.inputs import check_choice
from fastdiff.sde.processes import SDE, VE
from fastdiff.sde.score import Score
from fastdiff.sde.solvers.adaptive_schemes import (
    SCHEMES,
    Attempt,
    Exponential,
    ImprovedEuler,
    State,
)
from fastdiff.sde.solvers.brownian import SAME_TIME_RTOL, BrownianPath
from fastdiff.sde.solvers.ode import IndexedScore, score_of_rows
from fastdiff.sde.solvers.rounding import MAX_EVALUATIONS, RoundingWatch, rounded_differently
from fastdiff.sde.solvers.runge_kutta import (
    Integrated,
    arrival_bar,
    raise_if_stuck,
    rms,
    smallest_step,
)
from fastdiff.sde.solvers.stepping import check_count, check_images, check_positive

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
    """Generate images by the reverse-time SDE, from ``sde.end`` to ``sde.smallest``.

    A step is taken in two orders with the same noise. The difference of the results is its error;
    the result of higher order is kept. The paper retries a rejected step with new noise, which
    favours the noise of easy steps and makes images spread too far: with the paper's steps, samples
    of a mixture of two Gaussians in 2 dimensions have a standard deviation 5 to 30% too large, at
    any tolerance; in 256 dimensions there is no visible effect. Here a shorter step gets its part
    of the same path. This costs a fifth more evaluations, and memory for one or a few more batches
    of images.

    Warns once if steps are kept short because the score's rounding is larger than the tolerance.

    Args:
        score: ``(x [M, ...], t float64 [M])`` -> grad log p_t(x), like x.
        sde: the forward process.
        x_T: noise of the prior, [N, ...], floating point. The solver computes in float32 or
            float64; the score gets images of x_T's dtype and must return that dtype.
        scheme: "exponential", one evaluation per step, or the paper's "improved-euler", two.
        eps_rel: tolerance relative to the larger of the images before and after the step, as
            computed in the lower order. None is 0.1 for "exponential" and 0.05 for
            "improved-euler"; the paper uses 0.01, 0.02, 0.05 and 0.1, larger ones being faster.
        eps_abs: absolute tolerance. None is one of 256 levels: 1 / 256 with ``VE``, whose images
            are in [0, 1], else 2 / 256 for images in [-1, 1].
        h_init: the first step size. For "exponential" it is a change of log(alpha / sigma), None is
            0.3. For "improved-euler" it is a time, None is a hundredth of ``sde.end``.
        h_max: the largest step size, in the same unit. None is 0.85 for "exponential" and no limit
            for "improved-euler".
        norm: how an image's error over its tolerance is measured: "l2", the root mean square, or
            "linf", the maximum, several times slower.
        generator: source of the noise. An image's noise depends on the whole batch.
        denoise: end with the mean of x_0 given x at the smallest time (Tweedie's formula). This
            takes one more evaluation with "improved-euler" and none with "exponential".
        redraw: use new noise after a rejection, as the paper does.
        max_evaluations: limit of score evaluations for any one image.
        conditioned: see :func:`fastdiff.sde.solvers.ode.solve_ode`.
        progress: show a progress bar on standard error.

    Returns:
        The images, like ``x_T``, with the numbers of evaluations and steps.

    Raises:
        TypeError: ``x_T`` is not floating point, or the score returns another dtype.
        ValueError: an unknown scheme or norm, tolerances or step sizes that are not positive, or a
            score of another shape than x.
        FloatingPointError: the score is not finite.
        StuckError: a step is too small for float64, or needs more than ``max_evaluations``.
    """
    check_images(x_T, "x_T")
    check_choice("scheme", scheme, SCHEMES)
    check_choice("norm", norm, NORMS)
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
    with arrival_bar(len(x_T), progress) as bar:
        while len(run.index):
            bar.update(min(run.step(), bar.total - bar.n))  # rounding may exceed the total
    x = run.denoised() if denoise and len(x_T) else run.arrived
    return Integrated(x.to(x_T.dtype), *run.counts.unbind())


@dataclass
class _Run:
    """The M images still in the batch. ``arrived`` and ``counts`` are of all N images.

    ``index`` [M] has the images' numbers among the N.
    """

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
        self.before = self.x  # the images of lower order after the last accepted step
        self.arrived = self.x.clone()
        self.counts = torch.zeros(3, len(self.x), dtype=torch.int64, device="cpu")
        self.index = torch.arange(len(self.x), device="cpu")
        self.position = torch.full(
            (len(self.x),), self.steps.first, dtype=torch.float64, device="cpu"
        )
        self.h = torch.empty_like(self.position)  # the next step sizes
        self.state: State = ()
        self.arrived_state: State = ()  # the scheme's state of the images that have arrived
        self.path = BrownianPath(self.x, self.generator)
        self.setting = f"eps_rel {self.eps_rel:g}, eps_abs {self.eps_abs:g}"
        self.rounding = RoundingWatch(self.dtype, self.setting)

    def begin(self, h_init: float) -> None:
        """Set the first step sizes and the scheme's state."""
        self.h.fill_(h_init)
        self.state = self.steps.begin(self.x, self.evaluate)
        self.arrived_state = tuple(torch.empty_like(value) for value in self.state)

    def step(self) -> float:
        """Try a step of every image; return the sum of the shares of their way that they moved."""
        wanted = self.h.clamp(max=self.h_max)
        left = self.steps.last - self.position
        last = wanted >= left - SAME_TIME_RTOL * self.span  # leaves no tiny last step
        stop = torch.where(last, self.steps.last, self.position + wanted)
        h = stop - self.position
        spent = self.counts[0, self.index] + self.steps.cost > self.max_evaluations
        raise_if_stuck(
            self.index, self.steps.time(self.position), h <= smallest_step(self.position), h, spent,
            self.setting,
        )  # fmt: skip
        noise = self.path.increment(self.steps.clock(self.position, h))
        tried = self.steps.attempt(self.x, self.state, self.position, stop, noise, self.evaluate)
        scaled = self.scaled_error(tried)
        error = self.size(scaled)
        good = error <= 1
        self.counts[1, self.index] += good
        self.counts[2, self.index] += ~good
        if self.rounding.is_due(self.counts[0, self.index]):
            self.check_rounding(stop, noise, scaled, error)
        self.x, self.before = _kept(good, tried.high, self.x), _kept(good, tried.low, self.before)
        self.state = tuple(
            _kept(good, new, old) for new, old in zip(tried.state, self.state, strict=True)
        )
        # This is right also for a step cut short by the end: if accepted, no step follows it.
        factor = self.steps.safety * error**-self.steps.exponent
        self.h = h * factor.clamp(max=self.steps.growth)
        self.position = torch.where(good, stop, self.position)
        if self.redraw:
            self.path = BrownianPath(self.x, self.generator)
        self.path.advance(good)
        arrived = good & last
        if bool(arrived.any()):
            self.drop(arrived)
        return float((h * good).sum()) / self.span

    def check_rounding(self, stop: Tensor, noise: Tensor, scaled: Tensor, error: Tensor) -> None:
        """Repeat the step from images that are rounded differently, and compare the errors."""
        x = rounded_differently(self.x, self.dtype)
        again = self.steps.attempt(x, self.state, self.position, stop, noise, self.evaluate)
        change = self.size(self.scaled_error(again) - scaled)
        self.rounding.compare(
            error, change, self.index, self.steps.time(self.position), stop - self.position
        )

    def scaled_error(self, tried: Attempt) -> Tensor:
        """Each value's error divided by its tolerance, like x."""
        allowed = torch.maximum(tried.low.abs(), self.before.abs()).mul_(self.eps_rel)
        return (tried.high - tried.low) / allowed.clamp_(min=self.eps_abs)

    def size(self, scaled: Tensor) -> Tensor:
        """The norm of each image's scaled error, float64 [M] on the CPU."""
        if self.norm == "l2":
            return rms(scaled).cpu()
        return scaled.flatten(1).abs().amax(1).double().cpu()

    def evaluate(self, x: Tensor, t: Tensor) -> Tensor:
        """The score at images x and times t, counted and checked, in the solver's dtype."""
        self.counts[0, self.index] += 1
        score = score_of_rows(self.score, self.conditioned, self.index.to(x.device))
        images = x.to(self.dtype)
        gradient = score(images, t.to(x.device))
        check_like(gradient, images, "the score", "x")
        finite = gradient.isfinite().flatten(1).all(1).cpu()
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise FloatingPointError(
                f"the score of sample {int(self.index[row])} is not finite at t = {t[row].item():g}"
            )
        return gradient.to(x.dtype)

    def denoised(self) -> Tensor:
        """The mean of x_0 given x, for all N images after they have arrived."""
        self.index = torch.arange(len(self.arrived), device="cpu")
        return self.steps.denoised(self.arrived, self.arrived_state, self.evaluate)

    def drop(self, arrived: Tensor) -> None:
        """Remove images from the batch, and store them in ``self.arrived``."""
        device = self.x.device
        leaving, staying = arrived.nonzero().flatten(), (~arrived).nonzero().flatten()
        rows, places = staying.to(device), self.index[leaving].to(device)
        self.arrived[places] = self.x[leaving.to(device)]
        for kept, value in zip(self.arrived_state, self.state, strict=True):
            kept[places] = value[leaving.to(device)]
        self.x, self.before = self.x[rows], self.before[rows]
        self.state = tuple(value[rows] for value in self.state)
        self.position, self.h, self.index = (
            value[staying] for value in (self.position, self.h, self.index)
        )
        self.path.keep(staying)


def _kept(good: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new images where the step was good, else the old ones."""
    return torch.where(good.to(new.device).view(-1, *[1] * (new.ndim - 1)), new, old)
