"""Seed torch's global generators for a block of code, and restore them afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """For a ``with`` block, seed torch's global generators: the CPU's and all of the device's kind.

    Dropout and the initialisation of weights use these generators alone. At the end of the block
    their states are restored, so that the caller's own random numbers do not change.

    Args:
        seed: as for ``torch.manual_seed``.
        device: where the block computes; CUDA generators are seeded only for a CUDA device.
    """
    generators = [torch.default_generator]
    generators += getattr(getattr(torch, device.type, None), "default_generators", ())
    before = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
