"""``Solver``: a solver of continuous time chosen by name, with its options checked at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.common.inputs import check_choice
from fastdiff.sde.processes import EDM, SDE, VE
from fastdiff.sde.score import Score
from fastdiff.sde.solvers.adaptive import NORMS, solve_adaptive
from fastdiff.sde.solvers.adaptive_schemes import SCHEMES
from fastdiff.sde.solvers.fixed_steps import solve
from fastdiff.sde.solvers.known_part import Known
from fastdiff.sde.solvers.langevin import CORRECTORS, annealed_langevin
from fastdiff.sde.solvers.ode import IndexedScore, score_of_rows, solve_ode
from fastdiff.sde.solvers.predictors import METHODS as PREDICTORS
from fastdiff.sde.solvers.runge_kutta import METHODS as PAIRS
from fastdiff.sde.solvers.stepping import check_count, check_positive

Check = Callable[[Any, str], object]  # (an option's value, its name) -> raises if it is wrong

DEFAULT_STEPS = 500
# Defaults of annealed Langevin dynamics: steps at each level, and the last step over sigma_min^2.
LANGEVIN_STEPS_EACH, LANGEVIN_STEP_SHARE = 5, 0.2


@dataclass(frozen=True)
class Sampled:
    """Generated images and their cost.

    Attributes:
        x: the images [N, ...].
        evaluations: number of score evaluations for each image, int64 [N] on the CPU.
    """

    x: Tensor
    evaluations: Tensor


class Solver:
    """A method from noise to images with its options.

    Args:
        sde: the forward process.
        method: one of

            ode                 the probability-flow ODE to a tolerance, see ``solve_ode``: rtol,
                                atol, max_evaluations, and ``pair``, the Runge-Kutta method (dopri5,
                                bosh3, heun21)
            adaptive            the reverse-time SDE to a tolerance, see ``solve_adaptive``:
                                scheme, eps_rel, eps_abs, h_init, h_max, norm, denoise, redraw,
                                max_evaluations
            euler-maruyama, reverse-diffusion, ancestral, probability-flow
                                fixed steps, see ``solve``: corrector, snr, corrector_steps,
                                denoise, check_finite
            annealed-langevin   Langevin dynamics at falling levels of noise, for processes that do
                                not scale images (VE, EDM), see ``annealed_langevin``: steps_each
                                (by default 5), step (a at the last level, 0.2 sigma_min^2, which
                                is NCSN's 2e-5), denoise, check_finite. The levels, steps /
                                steps_each of them, fall geometrically.

        steps: total number of steps, for methods with fixed steps (None is 500); must be None for
            ode and adaptive.
        **options: the method's keyword arguments listed above.

    Raises:
        TypeError: an option that the method does not have, or of the wrong type.
        ValueError: an unknown method, steps for ode or adaptive, steps below 1, an option outside
            its range, or annealed Langevin dynamics with another process than VE or EDM.

    Example:
        >>> solver = Solver(sde, "adaptive", eps_rel=0.02)
        >>> images = solver.sample(score, solver.prior((16, 3, 32, 32))).x
    """

    def __init__(
        self, sde: SDE, method: str = "ode", steps: int | None = None, **options: Any
    ) -> None:
        check_choice("method", method, METHODS)
        known = _OPTIONS[method]
        unknown = [repr(name) for name in options if name not in known]
        if unknown:
            raise TypeError(
                f"{method} has no option {', '.join(unknown)}, it has {', '.join(known)}"
            )
        for name, value in options.items():
            known[name](value, name)
        if method in ("ode", "adaptive") and steps is not None:
            raise ValueError(f"{method} chooses its own steps, got steps={steps}")
        self.sde, self.method, self.options = sde, method, options
        self.steps: int | None = None
        if method not in ("ode", "adaptive"):
            self.steps = DEFAULT_STEPS if steps is None else check_count(steps, "steps")
        if method == "annealed-langevin":
            self._check_levels()

    def __repr__(self) -> str:
        steps = "" if self.steps is None else f", steps={self.steps}"
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Solver({self.sde!r}, {self.method!r}{steps}{options})"

    def prior(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Noise of the process's prior, float32 of ``shape`` [N, ...] on ``device``."""
        return self.sde.prior_sample(shape, generator=generator, device=device)

    def sample(
        self,
        score: Score | IndexedScore,
        x_T: Tensor,
        *,
        conditioned: bool = False,
        known: Known | None = None,
        generator: torch.Generator | None = None,
        progress: bool | str = True,
    ) -> Sampled:
        """Generate images from noise.

        Args:
            score: ``(x [M, ...], t float64 [M])`` -> grad log p_t(x), like x.
            x_T: noise of the prior, [N, ...], floating point.
            conditioned: whether the score takes a third argument, the numbers of its images in the
                batch, see :func:`fastdiff.sde.solve_ode`.
            known: a part of the images that is known, see ``solve``, whose methods take it.
            generator: source of the noise, None for PyTorch's global generator.
            progress: show a progress bar on standard error; with fixed steps a string names it.

        Raises:
            ValueError: a known part with a method that has no fixed steps of its own.
            TypeError, ValueError, FloatingPointError, StuckError: those of the method's function.
        """
        if known is not None and self.method not in PREDICTORS:
            raise ValueError(
                f"a known part is for {', '.join(PREDICTORS)}, {self.method} does not restore it"
            )
        if self.method == "ode":
            options = dict(self.options)
            result = solve_ode(
                score, self.sde, x_T, method=options.pop("pair", "dopri5"),
                conditioned=conditioned, progress=bool(progress), **options,
            )  # fmt: skip
            return Sampled(result.x, result.evaluations)
        if self.method == "adaptive":
            result = solve_adaptive(
                score, self.sde, x_T, conditioned=conditioned, generator=generator,
                progress=bool(progress), **self.options,
            )  # fmt: skip
            return Sampled(result.x, result.evaluations)
        evaluations = 0
        all_rows = torch.arange(len(x_T), device=x_T.device)
        score_of_all = score_of_rows(score, conditioned, all_rows)

        def counted(x: Tensor, t: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return score_of_all(x, t)

        x = self._by_steps(counted, x_T, {"generator": generator, "progress": progress}, known)
        return Sampled(x, torch.full((len(x_T),), evaluations, dtype=torch.int64, device="cpu"))

    def _by_steps(
        self, score: Score, x_T: Tensor, arguments: dict[str, Any], known: Known | None
    ) -> Tensor:
        assert self.steps is not None
        if self.method != "annealed-langevin":
            return solve(
                score, self.sde, x_T, self.steps, method=self.method, known=known, **arguments,
                **self.options,
            )  # fmt: skip
        sigmas = self._levels()
        step = LANGEVIN_STEP_SHARE * sigmas[-1].item() ** 2
        options = {"steps_each": LANGEVIN_STEPS_EACH, "step": step, **self.options}
        return annealed_langevin(
            lambda x, sigma: score(x, self.sde.time_at(sigma).clamp(0, self.sde.end)),
            sigmas, x_T, **options, **arguments,
        )  # fmt: skip

    def _levels(self) -> Tensor:
        """The noise levels sigma of annealed Langevin dynamics, float64, decreasing."""
        assert self.steps is not None
        ends = torch.tensor([self.sde.end, self.sde.smallest], dtype=torch.float64, device="cpu")
        first, last = self.sde.levels(ends)[1].log().tolist()
        count = self.steps // self.options.get("steps_each", LANGEVIN_STEPS_EACH)
        return torch.linspace(first, last, count, dtype=torch.float64, device="cpu").exp()

    def _check_levels(self) -> None:
        if not isinstance(self.sde, (VE, EDM)):
            raise ValueError(f"annealed-langevin needs the SDE VE or EDM, got {self.sde!r}")
        each = self.options.get("steps_each", LANGEVIN_STEPS_EACH)
        assert self.steps is not None
        if self.steps % each or self.steps < 2 * each:
            raise ValueError(
                f"annealed-langevin takes {each} steps at each of 2 levels or more: steps must be "
                f"a multiple of {each} from {2 * each} on, got {self.steps}"
            )


def names() -> tuple[str, ...]:
    """The methods of :class:`Solver` by name."""
    return METHODS


def _switch(value: Any, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _positive(value: Any, name: str) -> None:
    _check_real(value, name)
    check_positive(value, name)


def _positive_or_none(value: Any, name: str) -> None:
    if value is not None:
        _positive(value, name)


def _not_negative(value: Any, name: str) -> None:
    _check_real(value, name)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must not be negative, nor infinite, got {value}")


def _check_real(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _one_of(known: Collection[str | None]) -> Check:
    def check(value: Any, name: str) -> None:
        check_choice(name, value, known)

    return check


_STEPPED: dict[str, Check] = {"denoise": _switch, "check_finite": _switch}
_PREDICTOR: dict[str, Check] = {
    "corrector": _one_of((None, *CORRECTORS)),
    "snr": _positive,
    "corrector_steps": check_count,
    **_STEPPED,
}
_OPTIONS: dict[str, dict[str, Check]] = {
    "ode": {
        "rtol": _not_negative,
        "atol": _positive,
        "pair": _one_of(PAIRS),
        "max_evaluations": check_count,
    },
    "adaptive": {
        "scheme": _one_of(SCHEMES),
        "eps_rel": _positive_or_none,
        "eps_abs": _positive_or_none,
        "h_init": _positive_or_none,
        "h_max": _positive_or_none,
        "norm": _one_of(NORMS),
        "denoise": _switch,
        "redraw": _switch,
        "max_evaluations": check_count,
    },
    **{name: _PREDICTOR for name in PREDICTORS},
    "annealed-langevin": {"steps_each": check_count, "step": _positive, **_STEPPED},
}
METHODS = tuple(_OPTIONS)
