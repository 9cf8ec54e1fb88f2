"""From noise back to images: the reverse-time SDE and the probability-flow ODE."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastdiff.common.checks import beside
from fastdiff.sde.processes import SDE
from fastdiff.sde.score import Score


@dataclass(frozen=True)
class Reverse:
    """dx = (f x - ((1 + noise^2) / 2) g^2 score) dt + noise g dw, with time running backwards.

    noise = 1 is the reverse-time SDE (Anderson 1982; Song et al. 2021, arXiv:2011.13456, eq. 6),
    noise = 0 is the probability-flow ODE (Song et al., eq. 13). All noise between 0 and 1 have the
    same marginals (Huang et al. 2021, arXiv:2106.02808, eq. 15).

    Attributes:
        sde: the forward process.
        score: the score of its marginals.
        noise: factor of g in the diffusion, 0..1.

    Raises:
        ValueError: noise outside 0..1.
    """

    sde: SDE
    score: Score
    noise: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must lie in 0..1, got {self.noise}")

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift at images x [N, ...] and times t [N] or [], like x."""
        f, squared = self.sde.rates(self.sde.check_time(t, x))
        score = self.score(x, t.double().expand(x.shape[0]))
        share = (1 + self.noise**2) / 2
        return (beside(f, x) * x - beside(share * squared, x) * score).to(x.dtype)

    def diffusion(self, t: Tensor) -> Tensor:
        """noise g(t), float64, shaped like t."""
        return self.noise * self.sde.diffusion(t)


def reverse(sde: SDE, score: Score) -> Reverse:
    """The reverse-time SDE of a process, given its score."""
    return Reverse(sde, score)


def probability_flow(sde: SDE, score: Score) -> Reverse:
    """The probability-flow ODE of a process, given its score."""
    return Reverse(sde, score, noise=0.0)
