"""A known part of the images in solvers with fixed steps: inpainting and colorisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdiff.sde import VP, Solver, known_grey, known_pixels, solve
from fastdiff.sde.solvers.predictors import METHODS

SHARED, OWN = 0.5, 0.1  # variances of a pixel: what all channels share, and each one's own


def score(x: Tensor, t: Tensor) -> Tensor:
    """Of Gaussian images whose three channels are correlated, by their covariance."""
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in VP().levels(t))
    mean = x.mean(1, keepdim=True)
    along = mean / (alpha**2 * (3 * SHARED + OWN) + sigma**2)
    return -along - (x - mean) / (alpha**2 * OWN + sigma**2)


IMAGE = torch.linspace(-1, 1, 3 * 16, dtype=torch.float64).view(1, 3, 4, 4)
MASK = torch.ones(1, 1, 4, 4)
MASK[..., :2] = 0


def drawn(known, **options) -> Tensor:
    x_T = torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    return solve(score, VP(), x_T, 40, known=known, generator=generator, progress=False, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("corrector", [None, "langevin"])
def test_what_is_known_is_in_the_result(method: str, corrector: str | None) -> None:
    options = {"method": method, "corrector": corrector}
    filled = drawn(known_pixels(IMAGE, MASK), **options)
    wanted = IMAGE.expand_as(filled)
    torch.testing.assert_close(filled[..., :2], wanted[..., :2])
    assert not torch.allclose(filled[..., 2:], wanted[..., 2:], atol=0.1)
    coloured = drawn(known_grey(IMAGE), **options)
    torch.testing.assert_close(coloured.mean(1), wanted.mean(1))


def test_what_is_not_known_follows_it() -> None:
    """One channel of three is known: of the others the mean is SHARED / (SHARED + OWN) of it.

    A step that does not see the noise of the known part leaves them too independent, and correctors
    make both fit."""
    mask = torch.ones(1, 3, 4, 4)
    mask[:, 0] = 0
    known = known_pixels(torch.ones(1, 3, 4, 4, dtype=torch.float64), mask)

    def mean(steps: int, **options) -> float:
        generator = torch.Generator().manual_seed(2)
        x_T = torch.randn(40, 3, 4, 4, generator=generator, dtype=torch.float64)
        images = solve(
            score, VP(), x_T, steps, known=known, generator=generator, progress=False, **options
        )
        return images[:, 1:].mean().item()

    wanted = SHARED / (SHARED + OWN)
    corrected = mean(80, corrector="langevin", corrector_steps=20)
    assert 0.3 < mean(80) < 0.6
    assert corrected == pytest.approx(wanted, abs=0.08)


def test_colours_keep_their_spread() -> None:
    """What is independent of the grey is drawn as without it: with the variance OWN."""
    coloured = drawn(known_grey(IMAGE))
    rest = coloured - coloured.mean(1, keepdim=True)
    assert rest.square().sum(1).mean().item() == pytest.approx(2 * OWN, rel=0.1)


def test_solvers_by_name_take_it() -> None:
    known = known_pixels(IMAGE, MASK)
    x_T = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    found = Solver(VP(), "euler-maruyama", 3).sample(score, x_T, known=known, progress=False).x
    torch.testing.assert_close(found[..., :2], IMAGE.expand_as(found)[..., :2])
    with pytest.raises(ValueError, match=r"a known part is for .* adaptive does not restore"):
        Solver(VP(), "adaptive").sample(score, x_T, known=known, progress=False)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"shape \(200, 3, 4, 4\) or \(1, 3, 4, 4\), got"):
        drawn(known_pixels(IMAGE[:, :1], MASK))
    with pytest.raises(ValueError, match="must be a projection"):
        drawn(known_pixels(IMAGE, 0.5 * MASK))
