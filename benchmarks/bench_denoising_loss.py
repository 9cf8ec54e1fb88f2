"""denoising_loss for v, with its gradient, against the plain PyTorch expression."""

from __future__ import annotations

import torch
from comparison import every_dtype, every_shape
from torch import Tensor

from fastdiff import ops, schedules
from fastdiff.ops import reference


@every_dtype
@every_shape((16, 3, 32, 32), (8, 4, 64, 64), (64, 3, 64, 64))
def bench_denoising_loss(versus, shape, dtype) -> None:
    prediction, x0, noise = torch.randn(3, *shape).to(dtype)
    t = torch.randint(1000, shape[:1])
    signal, sigma = schedules.cosine().coefficients(x0.device, torch.float32)
    arguments = (x0, noise, t, -sigma, signal, torch.ones_like(signal))
    leaf = prediction.requires_grad_()
    grad = torch.full(shape[:1], 1.0)

    def trained(loss_of):
        def run() -> list[Tensor]:
            loss = loss_of(leaf, *arguments)
            return [loss.detach(), *torch.autograd.grad(loss, leaf, grad)]

        return run

    ours, theirs = trained(ops.denoising_loss), trained(reference.denoising_loss)
    for a, b in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-5)
    versus(ours, {"torch": theirs})
