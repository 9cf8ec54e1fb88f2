"""Solve the reverse SDE and the probability-flow ODE of a mixture whose score is known.

Two Gaussians in some dimensions stand for the data, so that no network is needed and the truth is
known: the log-likelihood by the ODE is compared with the exact one, and what each solver draws with
the mixture's own standard deviation.

    python examples/known_score.py --dimensions 16 --points 200
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from fastdiff import sde

MEAN, STD = 0.5, 0.1  # two equal Gaussians at +-MEAN in every coordinate


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--dimensions", type=int, default=16)
    options.add_argument("--points", type=int, default=200, help="drawn by each solver")
    args = options.parse_args()
    process = sde.VP()

    def scaled(t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance at time t of the Gaussian at +MEAN, [N, 1] each."""
        alpha, sigma = (level.view(-1, 1) for level in process.levels(t))
        return alpha * MEAN, (alpha * STD) ** 2 + sigma**2

    def log_density(x: Tensor, t: Tensor) -> Tensor:
        mean, variance = scaled(t)
        sides = [-0.5 * ((x - m) ** 2 / variance + (2 * math.pi * variance).log()).sum(1)
                 for m in (mean, -mean)]  # fmt: skip
        return torch.logaddexp(*sides) - math.log(2)

    def score(x: Tensor, t: Tensor) -> Tensor:
        mean, variance = scaled(t)
        return (mean * torch.tanh((mean * x / variance).sum(1, keepdim=True)) - x) / variance

    shape = (args.points, args.dimensions)
    wanted = math.hypot(MEAN, STD)
    print(f"{'solver':<16} {'evaluations':>11}   standard deviation, {wanted:.4f} is right")
    ways = {
        "ode": {"rtol": 1e-4, "atol": 1e-4},
        "adaptive": {"eps_rel": 0.02},
        "euler-maruyama": {"steps": 200},
    }
    for method, own in ways.items():
        noise = torch.Generator().manual_seed(0)
        x = process.prior_sample(shape, generator=noise, dtype=torch.float64)
        drawn = sde.Solver(process, method, **own).sample(score, x, progress=False)
        spent, spread = drawn.evaluations.double().mean(), drawn.x.square().mean().sqrt()
        print(f"{method:<16} {spent:11.1f}   {spread:.4f}")

    exact = log_density(
        drawn.x, torch.full((args.points,), process.trained_from, dtype=torch.float64)
    )
    by_ode = sde.log_likelihood(score, process, drawn.x, rtol=1e-6, atol=1e-6, trace="exact")
    print(f"log-likelihood by the ODE: largest error {(by_ode.logp - exact).abs().max():.1e} nats")


if __name__ == "__main__":
    main()
