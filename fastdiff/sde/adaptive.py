"""The reverse-time SDE with step sizes of its own for every image.

Jolicoeur-Martineau et al. 2021, "Gotta go fast when generating data with score-based models",
arXiv:2105.14080, algorithm 1, with one thing mended: what a rejected step has learnt of its
Brownian path stays true for the steps that replace it (as in Rackauckas & Nie 2017,
doi:10.3934/dcdsb.2017133). Images that have arrived leave the batch and cost nothing more, as in
:mod:`fastdiff.sde.runge_kutta`; step sizes and times are float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.ops.checks import beside, check_like, wide_dtype
from fastdiff.sde._evaluate import check_count, check_images, check_positive, normal
from fastdiff.sde.ode import IndexedScore, score_of_rows
from fastdiff.sde.process import SDE, VE
from fastdiff.sde.runge_kutta import Integrated, refuse_stuck, rms, travel_bar
from fastdiff.sde.score import Score, prediction_fn

SAFETY, EXPONENT = 0.9, 0.9  # theta and r of the paper


@torch.no_grad()
def solve_adaptive(
    score: Score | IndexedScore,
    sde: SDE,
    x_T: Tensor,
    *,
    eps_rel: float = 0.05,
    eps_abs: float | None = None,
    h_init: float = 0.01,
    norm: str = "l2",
    generator: torch.Generator | None = None,
    denoise: bool = True,
    redraw: bool = False,
    max_evaluations: int = 100_000,
    conditioned: bool = False,
    progress: bool = True,
) -> Integrated:
    """Draw images by the reverse-time SDE, from ``sde.end`` to ``sde.smallest``.

    A step is one of Euler-Maruyama, x', and one of the stochastic improved Euler method with the
    same noise, x''; their difference is its error, and x'' is kept. The paper tries a rejected step
    again with new noise. That prefers the noise of easy steps, and images spread too far: those of
    a mixture of two Gaussians in 2 dimensions have a deviation 5 to 30% too large, at any
    tolerance; in 256 dimensions nothing is to be seen of it. Here the shorter step gets its part of
    the same path, for a fifth more evaluations and memory for one more batch of images or a few.

    Args:
        score: ``(x [M, ...], t float64 [M])`` -> grad log p_t(x), like x.
        sde: the forward process.
        x_T: noise of the prior, [N, ...], floating point. The solver keeps images in float32 or
            better and hands them to the score, and back, in their dtype.
        eps_rel: relative tolerance, against the larger of x' and the x' before; the paper has 0.01,
            0.02, 0.05 and 0.1, ever faster.
        eps_abs: absolute tolerance; by default one of 256 levels, 2 / 256 for images in [-1, 1]
            and 1 / 256 with ``VE``, whose images are in [0, 1].
        h_init: the first step size, in units of ``sde.end``.
        norm: of an image's error over its tolerance: "l2", the root mean square, or "linf", the
            largest, several times slower.
        generator: source of the noise; it depends on the whole batch.
        denoise: end with the mean of x_0 given x at the smallest time (Tweedie's formula), in one
            more evaluation.
        redraw: draw new noise after a rejection, as the paper does.
        max_evaluations: of the score, for any one image.
        conditioned: as in :func:`fastdiff.sde.ode.solve_ode`.
        progress: show a bar.

    Raises:
        TypeError: ``x_T`` is not floating point, or what the score returns not of its dtype.
        ValueError: tolerances or a first step that are not positive, an unknown norm, or a score of
            another shape than x.
        FloatingPointError: the score is not finite.
        RuntimeError: a step too small for float64, or ``max_evaluations`` used up.
    """
    check_images(x_T, "x_T")
    if eps_abs is None:
        eps_abs = 1 / 256 if isinstance(sde, VE) else 2 / 256
    for value, name in ((eps_rel, "eps_rel"), (eps_abs, "eps_abs"), (h_init, "h_init")):
        check_positive(value, name)
    if norm not in ("l2", "linf"):
        raise ValueError(f"unknown norm {norm!r}, wanted l2 or linf")
    check_count(max_evaluations, "max_evaluations")
    run = _Run(
        score, sde, x_T, eps_rel, eps_abs, norm, generator, redraw, max_evaluations, conditioned
    )
    run.h.fill_(min(h_init * sde.end, run.span))
    with travel_bar(len(x_T), progress) as bar:
        while len(run.index):
            bar.update(run.step())
    x = run.arrived.to(x_T.dtype)
    if denoise and len(x):
        x = run.denoised(x)
    return Integrated(x, *run.counts.unbind())


@dataclass
class _Run:
    """The images still on their way: everything is [M, ...] but ``arrived`` and ``counts``."""

    score: Score | IndexedScore
    sde: SDE
    x: Tensor
    eps_rel: float
    eps_abs: float
    norm: str
    generator: torch.Generator | None
    redraw: bool
    max_evaluations: int
    conditioned: bool

    def __post_init__(self) -> None:
        self.dtype, self.span = self.x.dtype, self.sde.end - self.sde.smallest
        self.x = self.x.to(wide_dtype(self.dtype))
        self.before = self.x  # x' of the last good step
        self.arrived = self.x.clone()
        self.counts = torch.zeros(3, len(self.x), dtype=torch.int64)
        self.index = torch.arange(len(self.x))
        self.t = torch.full((len(self.x),), self.sde.end, dtype=torch.float64)
        self.h = torch.empty_like(self.t)  # wanted next
        self.path = _Path(self.x, self.generator, rounding=1e-12 * self.span)

    def step(self) -> float:
        """Try a step with every image; returns how much nearer they are, in images."""
        left = self.t - self.sde.smallest
        h = self.path.limit(torch.minimum(self.h, left))
        last = h >= left - self.path.rounding
        t = torch.where(last, self.sde.smallest, self.t - h)
        spent = self.counts[0, self.index] + 2 > self.max_evaluations
        setting = f"eps_rel {self.eps_rel:g}, eps_abs {self.eps_abs:g}"
        refuse_stuck(self.index, self.t, h, spent, setting)
        noise = self.path.increment(h)
        euler = self.x + self.moved(self.x, self.t, h, noise)
        x = (euler + self.x + self.moved(euler, t, h, noise)) / 2
        allowed = torch.maximum(euler.abs(), self.before.abs()).mul_(self.eps_rel)
        scaled = (euler - x) / allowed.clamp_(min=self.eps_abs)
        error = (rms(scaled) if self.norm == "l2" else scaled.flatten(1).abs().amax(1)).cpu()
        good = error <= 1
        self.counts[1, self.index] += good
        self.counts[2, self.index] += ~good
        kept = good.to(x.device).view(-1, *[1] * (x.ndim - 1))
        self.x, self.before = torch.where(kept, x, self.x), torch.where(kept, euler, self.before)
        self.t = torch.where(good, t, self.t)
        wanted = SAFETY * h * error.double() ** -EXPONENT
        # A good step that was cut short says nothing against the size that was wanted.
        self.h = torch.where(good, torch.where(h < self.h, self.h, 0).maximum(wanted), wanted)
        self.path.forget(torch.ones_like(good) if self.redraw else good)
        arrived = good & last
        if bool(arrived.any()):
            self.drop(arrived)
        return float((h * good).sum()) / self.span

    def moved(self, x: Tensor, t: Tensor, h: Tensor, noise: Tensor) -> Tensor:
        """What a step of h and its Brownian increment add, with the coefficients at x and t."""
        self.counts[0, self.index] += 1
        found = self.ask(x.to(self.dtype), t, self.index)
        f, squared = self.sde.rates(t)
        wide = found.to(x.dtype)
        return (
            beside(h * squared, x) * wide - beside(h * f, x) * x + beside(squared.sqrt(), x) * noise
        )

    def ask(self, x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        """The score, checked."""
        score = score_of_rows(self.score, self.conditioned, index.to(x.device))
        found = score(x, t.to(x.device))
        check_like(found, x, "the score", "x")
        finite = found.isfinite().flatten(1).all(1).cpu()
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise FloatingPointError(
                f"the score of sample {int(index[row])} is not finite at t = {t[row].item():g}"
            )
        return found

    def denoised(self, x: Tensor) -> Tensor:
        """The mean of x_0 given images at the smallest time."""
        everyone = torch.arange(len(x))
        self.counts[0] += 1
        t = torch.full((len(x),), self.sde.smallest, dtype=torch.float64)
        mean = prediction_fn(lambda x, t: self.ask(x, t.cpu(), everyone), "x0", self.sde)
        return mean(x, t.to(x.device))

    def drop(self, arrived: Tensor) -> None:
        """Let images leave the batch."""
        device = self.x.device
        leaving, staying = arrived.nonzero().flatten(), (~arrived).nonzero().flatten()
        self.arrived[self.index[leaving].to(device)] = self.x[leaving.to(device)]
        self.x, self.before = self.x[staying.to(device)], self.before[staying.to(device)]
        self.t, self.h, self.index = self.t[staying], self.h[staying], self.index[staying]
        self.path.keep(staying)


class _Path:
    """What is known of the Brownian paths ahead: their increments over gaps [M], nearest first.

    A step has the nearest gap to itself. One that is rejected leaves it known, and a shorter one
    cuts it in two by the law of the Brownian bridge; only an accepted one removes it.
    """

    def __init__(self, x: Tensor, generator: torch.Generator | None, rounding: float) -> None:
        self.generator, self.rounding = generator, rounding
        self.gaps = [torch.zeros(len(x), dtype=torch.float64)]  # 0 where nothing is known
        self.increments = [torch.zeros_like(x)]

    def limit(self, h: Tensor) -> Tensor:
        """Step sizes that end no later than the nearest gap."""
        known = self.gaps[0]
        return torch.where((known > 0) & (h > known - self.rounding), known, h)

    def increment(self, h: Tensor) -> Tensor:
        """The increments [M, ...] over step sizes that ``limit`` has passed."""
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
        rows = where.to(increment.device).view(-1, *[1] * (increment.ndim - 1))
        self.gaps[k] = torch.where(where, gap, self.gaps[k])
        self.increments[k] = torch.where(rows, increment, self.increments[k])

    def keep(self, rows: Tensor) -> None:
        """Let the paths of all other images go."""
        self.gaps = [gap[rows] for gap in self.gaps]
        self.increments = [one[rows.to(one.device)] for one in self.increments]
