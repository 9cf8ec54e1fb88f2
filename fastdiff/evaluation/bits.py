"""Bits per value that a model of the digits needs to code held-out digits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.data.datasets import digits
from fastdiff.evaluation.digit_measures import check_digits
from fastdiff.nn.wrappers import unwrapped
from fastdiff.schedules import FlowSchedule, NoiseSchedule


@dataclass(frozen=True)
class Bits:
    """Bits per value of held-out digits, rounded to 256 levels.

    Attributes:
        bits_bound: by the variational bound; None for a process that has no such bound.
        bits_ode: by the probability-flow ODE, of uniformly dequantised digits; None for a schedule
            that has no view in continuous time.
        bits_digits: number of digits.
    """

    bits_bound: float | None
    bits_ode: float | None
    bits_digits: int

    def as_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def measure_bits(
    checkpoint: Checkpoint,
    count: int = 16,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> Bits:
    """Bits per value that a model needs to code held-out digits: see :class:`Bits`.

    Args:
        checkpoint: a class-conditional model of the digits.
        count: number of held-out digits, evenly spaced in the set's order; all if there are fewer.
        rtol: relative tolerance of the ODE.
        atol: absolute tolerance of the ODE.
        seed: of the bound's noise, the dequantisation and the trace's probes.
        progress: show a progress bar on standard error.

    Raises:
        InputError: another kind of model.
    """
    check_digits(checkpoint)
    test, diffusion = digits("test", checkpoint.image_size), checkpoint.diffusion()
    assert test.labels is not None
    count = min(count, len(test))
    chosen = torch.linspace(0, len(test) - 1, count, device="cpu").round().long()
    device = unwrapped(checkpoint.model).device
    x0 = (((test.images[chosen] + 1) * 127.5).round() / 127.5 - 1).to(device)
    cond = {"class_labels": test.labels[chosen].to(device)}
    bound = ode = None
    if isinstance(checkpoint.forward, NoiseSchedule):
        bits = diffusion.bits_per_dim(x0, method="bound", cond=cond, seed=seed, progress=progress)
        bound = float(bits.mean())
    if not diffusion.path.has_zero_terminal_snr or isinstance(checkpoint.forward, FlowSchedule):
        bits = diffusion.bits_per_dim(
            x0, method="ode", cond=cond, rtol=rtol, atol=atol, seed=seed, progress=progress,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        ode = float(bits.mean())
    return Bits(bound, ode, count)
