"""Seeds for what draws from torch's global generators, which are put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """For a block, seed torch's global generators: the CPU's and all of the device's kind.

    Dropout and the initialisation of weights can draw from no other generators. After the block
    they stand where they stood before, so that the caller's own random numbers do not change.

    Args:
        seed: as ``torch.manual_seed`` takes it.
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
