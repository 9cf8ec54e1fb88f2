"""Training for a few steps: the pairs of timesteps that it draws, and the loss between them.

    name         what the network learns                                  source
    consistency  the same image at both ends of an interval of noise      arXiv:2303.01469
                                                                          and arXiv:2310.14189
    progressive  in one step of DDIM what its teacher does in two         arXiv:2202.00512
    reflow       the straight line from noise to the image made of it     arXiv:2209.03003

All but reflow train on timesteps of a path. An SDE becomes one by ``sde.discretize``. The image
that the network jumps to is the x_0 that its prediction implies. So any sampler runs a network that
was trained so, and a student that begins with its teacher's weights begins with its predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff import sde
from fastdiff.common.model import Model
from fastdiff.losses.consistency_loss import (
    Step,
    consistency_loss,
    discretized_log_normal,
    intervals_at,
    prediction_form,
)
from fastdiff.losses.jumps import CLEAN, ddim_jump
from fastdiff.losses.progressive_distillation import progressive_loss
from fastdiff.schedules import GaussianPath

NAMES = ("consistency", "progressive", "reflow")
FEW_STEPS = {
    "consistency": 2,
    "progressive": 4,
    "reflow": 4,
}  # of sampling, if nothing else is said
INTERVALS = (10, 640)  # of consistency training, at first and at last
TAUGHT_INTERVALS = (40, 40)  # of consistency distillation


@dataclass(frozen=True)
class FewSteps:
    """What training for a few steps is told besides the process and the prediction.

    Attributes:
        few_steps: steps that the network is meant to be sampled in; None for :data:`FEW_STEPS`.
        teacher: the network to learn from, (x_t, label, **cond) -> the same prediction; None for
            consistency training, or for a network that is only sampled.
        steps: of the training, over which the intervals of consistency training double; None for
            the last number of intervals from the beginning.
        intervals: of consistency, the number of them at first and at last; the last is the first
            times a power of two. None for :data:`INTERVALS`, or with a teacher
            :data:`TAUGHT_INTERVALS`, or as many as a short path has.
        seeds: of reflow, those of the noise that each training image was made of, int64 [M, 2].
        record: JSON values by which a resumed run finds its teacher again; None if the objective's
            name says all.
    """

    few_steps: int | None = None
    teacher: Model | None = None
    steps: int | None = None
    intervals: tuple[int, int] | None = None
    seeds: Tensor | None = None
    record: Mapping[str, Any] | None = field(default=None, compare=False)


class OnPath:
    """A process as a path with timesteps, and networks of the process in its terms.

    Args:
        forward: a path, or an SDE, of which a path of ``timesteps`` is made.
        prediction: what the networks predict.
        timesteps: of the path of an SDE.
    """

    def __init__(
        self, forward: GaussianPath | sde.SDE, prediction: str, timesteps: int = 1000
    ) -> None:
        self._sde, self._prediction = isinstance(forward, sde.SDE), prediction
        self.path = sde.discretize(forward, timesteps) if isinstance(forward, sde.SDE) else forward
        self.kind = self.network(lambda x, t: x)[1]

    def network(self, model: Model) -> tuple[Model, str]:
        """A network of the process, called with labels of the path; and what it predicts then."""
        if not self._sde:
            return model, self._prediction
        assert isinstance(self.path, sde.DiscretizedSDE)
        return sde.on_path(model, self._prediction, self.path)


class Intervals:
    """Pairs of neighbouring timesteps of a grid, int64 [n, 2], the one with more noise first.

    Args:
        grid: rising timesteps, int64 [S + 1].
        probabilities: of each of the S intervals, float64 [S].
    """

    def __init__(self, grid: Tensor, probabilities: Tensor) -> None:
        self.pairs = torch.stack([grid[1:], grid[:-1]], dim=1)
        self.edges = probabilities.cumsum(0) / probabilities.sum()

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n intervals at random, and weights of 1."""
        shares = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
        return self.quantiles(shares), torch.ones_like(shares)

    def quantiles(self, shares: Tensor) -> Tensor:
        """The intervals below which shares of all draws lie, that of the least noise first."""
        at = torch.searchsorted(self.edges, shares.contiguous(), right=True)
        return self.pairs[at.clamp(max=len(self.pairs) - 1)]


class Consistency:
    """Consistency training, or distillation if there is a teacher.

    Without a teacher, the network agrees with itself at x_s that has the noise of x_t. The grid has
    more intervals in later steps (arXiv:2310.14189, section 3.4). With EDM's process intervals are
    drawn with log-normal levels, and losses are divided by their lengths (sections 3.3 and 3.5).

    With other processes, where sigma / alpha spans too much for that, intervals are even in time,
    and losses are divided by the factor of the network's output in the image. So the output learns
    as much from every time: where there is little noise its error hardly shows in the image, but
    each interval hands it on to all with more noise.

    With a teacher, x_s is a step of DDIM by the teacher, and intervals are few, even in time and
    weighted likewise (arXiv:2303.01469, algorithm 2). The target is the network itself, without an
    average (arXiv:2310.14189, section 3.2).

    Raises:
        ValueError: more intervals than the path has, or an end that doubling does not reach.
    """

    def __init__(self, forward: GaussianPath | sde.SDE, prediction: str, plan: FewSteps) -> None:
        taught = plan.teacher is not None
        first, last = plan.intervals or (TAUGHT_INTERVALS if taught else INTERVALS)
        on_path = OnPath(forward, prediction, max(1000, last + 1))
        self.path, self.kind, self._network = on_path.path, on_path.kind, on_path.network
        most = self.path.num_timesteps - 1
        while plan.intervals is None and last > most:
            last //= 2
        first = first if plan.intervals else min(first, last)
        self.first, self.last = first, last
        if first < 1 or last % first or (last // first).bit_count() != 1:
            raise ValueError(
                "intervals at last must be those at first times a power of two, got "
                f"{first} and {last}"
            )
        if last > most:
            raise ValueError(f"{most + 1} timesteps have fewer than {last} intervals")
        self._log_normal = isinstance(forward, sde.EDM) and not taught
        self._steps, self._teacher = plan.steps, plan.teacher
        self._form = prediction_form(self.path, self.kind)

    def count(self, step: int | None) -> int:
        """The number of intervals at a training step; at the last one for None."""
        if step is None or self._steps is None:
            return self.last
        return intervals_at(min(step, self._steps - 1), self._steps, self.first, self.last)

    def at(self, step: int | None) -> Intervals:
        """What a training step draws from, or for None the last one."""
        count = self.count(step)
        top = self.path.num_timesteps - 1
        grid = (torch.arange(count + 1, dtype=torch.float64, device="cpu") * top / count).round()
        grid = grid.long()
        if self._log_normal:
            return Intervals(grid, discretized_log_normal(self.path, grid))
        return Intervals(grid, torch.ones(count, dtype=torch.float64, device="cpu"))

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n of the last intervals at random, and weights of 1."""
        return self.at(None).draw(n, generator)

    def quantiles(self, shares: Tensor) -> Tensor:
        """The last intervals below which shares of all draws lie."""
        return self.at(None).quantiles(shares)

    def losses(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor, **cond: Any) -> Tensor:
        """The loss of each image at its interval ``t``, int64 [N, 2]; float32 or 64 [N]."""
        network, _ = self._network(model)
        more, less = t.unbind(1)
        found = consistency_loss(
            self.path, network, network, x0, more, less, noise,
            form=self._form, teacher=self._step(x0.dtype, cond), **cond,
        )  # fmt: skip
        if not self._log_normal:
            _, of_output = self._form
            return found / of_output.to(t.device)[more].abs().to(found.dtype)
        ratio = (self.path.sigma_t / self.path.alpha_t).to(t.device)
        return found / (ratio[more] - ratio[less]).to(found.dtype)

    def _step(self, dtype: torch.dtype, cond: Mapping[str, Any]) -> Step | None:
        """The teacher's step of DDIM on images of a dtype; None without a teacher."""
        if self._teacher is None:
            return None
        teacher, _ = self._network(self._teacher)

        def step(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return ddim_jump(self.path, teacher, self.kind, x_t.to(dtype), t, s, **cond)

        return step


class Progressive:
    """Progressive distillation: each step of the student is two of DDIM by its teacher.

    The student's N steps are those of the grid ``trailing``; the teacher's 2 N halve them.

    Raises:
        ValueError: fewer than 2 N timesteps.
    """

    def __init__(self, forward: GaussianPath | sde.SDE, prediction: str, plan: FewSteps) -> None:
        on_path, self._teacher = OnPath(forward, prediction), plan.teacher
        self.path, self.kind, self._network = on_path.path, on_path.kind, on_path.network
        steps, total = plan.few_steps or FEW_STEPS["progressive"], self.path.num_timesteps
        if not 1 <= 2 * steps <= total:
            raise ValueError(
                f"a teacher's {2 * steps} steps do not fit into {total} timesteps; the student's "
                f"must lie in 1..{total // 2}, got {steps}"
            )
        i = torch.arange(2 * steps + 1, dtype=torch.float64, device="cpu")
        grid = (i * total / (2 * steps)).round().long() + CLEAN
        self.jumps = torch.stack([grid[2::2], grid[1::2], grid[:-2:2]], dim=1)

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n of the student's steps at random, and weights of 1."""
        at = torch.randint(len(self.jumps), (n,), generator=generator, device="cpu")
        return self.jumps[at], torch.ones(n, dtype=torch.float64, device="cpu")

    def quantiles(self, shares: Tensor) -> Tensor:
        """The steps at shares of all, that with the least noise first."""
        return self.jumps[(shares * len(self.jumps)).long()]

    def losses(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor, **cond: Any) -> Tensor:
        """The loss of each image at its step ``t``: start, middle and end, int64 [N, 3]."""
        if self._teacher is None:
            raise ValueError("progressive distillation needs a teacher: see fastdiff distill")
        (student, _), (teacher, _) = self._network(model), self._network(self._teacher)
        start, middle, end = t.unbind(1)
        return progressive_loss(
            self.path, student, teacher, x0, start, middle, end, noise, kind=self.kind, **cond
        )
