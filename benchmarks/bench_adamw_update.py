"""Clipping, AdamW and the average of the weights against PyTorch's, one after another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.training.adamw import AdamW, clipping_factor

SHAPES = [(256, 256, 3, 3)] * 30 + [(256,)] * 100
CLIP, WEIGHT = 1.0, 1e-3


def make() -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters with gradients, and averages."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    parameters = [nn.Parameter(normal(shape)) for shape in SHAPES]
    for p in parameters:
        p.grad = normal(tuple(p.shape))
    return parameters, [p.detach().clone() for p in parameters]


def bench_adamw_update(versus) -> None:
    (parameters, averages), (leaves, others) = make(), make()
    optimizer, peer = AdamW(parameters, lr=1e-4), torch.optim.AdamW(leaves, lr=1e-4, fused=True)

    def ours() -> None:
        norm = float(ops.gradient_norm([p.grad for p in parameters if p.grad is not None]))
        optimizer.step(
            gradient_factor=clipping_factor(norm, CLIP), averages=averages, average_weight=WEIGHT
        )

    def theirs() -> None:
        nn.utils.clip_grad_norm_(leaves, CLIP)
        peer.step()
        with torch.no_grad():
            torch._foreach_lerp_(others, leaves, WEIGHT)

    ours()
    theirs()
    for a, b in zip([*parameters, *averages], [*leaves, *others], strict=True):
        torch.testing.assert_close(a, b)
    versus(ours, {"torch": theirs})
