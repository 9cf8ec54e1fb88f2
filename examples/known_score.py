"""Solve the reverse SDE and the probability-flow ODE of a mixture whose score is known.

Two Gaussians stand for the data, so no network is needed and the truth is known: what each solver
draws is compared with the mixture's standard deviation, and likelihoods with the exact ones.

    python examples/known_score.py --dimensions 16 --points 200
"""

import argparse
import math

import torch
from torch import Tensor

from fastdiff import sde

MEAN, STD = 0.5, 0.1  # of two equal Gaussians, at +MEAN and -MEAN in every coordinate
PROCESS = sde.VP()
WAYS = {"ode": {"rtol": 1e-4, "atol": 1e-4}, "adaptive": {}, "euler-maruyama": {"steps": 200}}


def moments(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance at time t of the Gaussian at +MEAN, [N, 1] each."""
    alpha, sigma = (level.view(-1, 1) for level in PROCESS.levels(t))
    return alpha * MEAN, (alpha * STD) ** 2 + sigma**2


def log_density(x: Tensor, t: Tensor) -> Tensor:
    mean, variance = moments(t)
    a, b = (-((x - m) ** 2 / variance).sum(1) / 2 for m in (mean, -mean))
    constant = (2 * math.pi * variance).log()[:, 0] * x.shape[1] / 2 + math.log(2)
    return torch.logaddexp(a, b) - constant


def score(x: Tensor, t: Tensor) -> Tensor:
    mean, variance = moments(t)
    return (mean * torch.tanh((mean * x / variance).sum(1, keepdim=True)) - x) / variance


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--dimensions", type=int, default=16)
    options.add_argument("--points", type=int, default=200, help="drawn by each solver")
    args = options.parse_args()
    print(
        f"solver            evaluations   standard deviation ({math.hypot(MEAN, STD):.4f} is right)"
    )
    for method, own in WAYS.items():
        shape, noise = (args.points, args.dimensions), torch.Generator().manual_seed(0)
        x = PROCESS.prior_sample(shape, generator=noise, dtype=torch.float64)
        drawn = sde.Solver(PROCESS, method, **own).sample(score, x, progress=False)
        spent, spread = drawn.evaluations.double().mean(), drawn.x.square().mean().sqrt()
        print(f"{method:<16} {spent:12.1f}   {spread:.4f}")
    exact = log_density(drawn.x, torch.full((args.points,), PROCESS.trained_from).double())
    by_ode = sde.log_likelihood(score, PROCESS, drawn.x, trace="exact", progress=False)
    print(f"log-likelihood by the ODE: largest error {(by_ode.logp - exact).abs().max():.1e} nats")


if __name__ == "__main__":
    main()
