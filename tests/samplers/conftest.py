"""Fixtures of the sampler tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(name="x_T")
def starting_noise(generator):
    """The noise a run begins with, float64; larger than usual, so that clipping does something."""
    return 2 * torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)


@pytest.fixture
def noises(generator):
    """Noise for 100 rows, float64."""
    return torch.randn(100, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
