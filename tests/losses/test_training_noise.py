"""Offset noise has the covariance it should, immiscible noise is the nearest assignment."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastdiff import losses, ops


def test_offset_noise_is_shared_by_a_channel(generator):
    """Variance 1 + s^2, covariance s^2 in a channel and 0 between channels."""
    noise = torch.randn(20000, 2, 2, 1, generator=generator, dtype=torch.float64)
    found = losses.offset_noise(noise, 0.5, generator=generator).flatten(1)
    wanted = torch.eye(4, dtype=torch.float64) + 0.25 * torch.block_diag(
        *[torch.ones(2, 2, dtype=torch.float64)] * 2
    )
    assert (torch.cov(found.T) - wanted).abs().max() < 0.05
    assert torch.equal(losses.offset_noise(noise, 0.0), noise)
    with pytest.raises(ValueError, match="strength of at least 0"):
        losses.offset_noise(noise, -1.0)
    with pytest.raises(ValueError, match=r"noise \[N, C, ...\]"):
        losses.offset_noise(noise[:, 0, 0, 0])


def test_the_assignment_is_the_nearest_of_all(generator):
    pytest.importorskip("scipy")
    x0 = torch.rand(5, 1, 3, 3, generator=generator) * 2 - 1
    noise = torch.randn(5, 1, 3, 3, generator=generator)

    def distance(order):
        return (x0 - noise[list(order)]).square().sum().item()

    order = losses.assign_noise(x0, noise)
    assert order.dtype == torch.int64
    best = min(itertools.permutations(range(5)), key=distance)
    assert order.tolist() == list(best)
    assert distance(best) < distance(range(5))


def test_seeds_are_assigned_as_their_noise(generator):
    pytest.importorskip("scipy")
    x0 = torch.rand(4, 1, 3, 3, generator=generator)
    seeds = torch.tensor([[7, i] for i in range(4)])
    noise = ops.philox_normal(seeds, 0, x0.shape)
    order = losses.assign_noise(x0, noise)
    assert torch.equal(ops.philox_normal(seeds[order], 0, x0.shape), noise[order])
    with pytest.raises(ValueError, match="noise must have shape"):
        losses.assign_noise(x0, noise[:2])
