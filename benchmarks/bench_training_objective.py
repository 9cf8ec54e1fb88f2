"""The training objective: noising, target and weighted error, alone and around a whole U-Net.

The peers are the objective in plain PyTorch, in its fastest eager form (addcmul, one mse_loss
without weights; in half precision the error is taken in float32, as trainers do), and the same code
compiled by Inductor. In the cases "drawn" generating the noise is timed too: by torch.randn_like
for the peers, from random seeds for fastdiff; both are standard normal, with other values. With
--benchmark-disable nothing is compiled by Inductor and the network is tiny.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from comparison import every_dtype, every_shape, on_reference

from fastdiff import losses, ops, schedules
from fastdiff.nn.image_unet import make_unet

SCHEDULE = schedules.cosine(1000)
KINDS = {"eps": "none", "v": "min_snr"}  # kinds of prediction, each with its loss weighting
EMA = 1e-4
BATCH = 16
SIZE = {"image_size": 32, "widths": (128, 256, 256, 256), "attention": (1,)}  # DDPM on CIFAR-10
TINY = {"image_size": 8, "widths": (8, 16), "attention": (1,), "layers_per_block": 1}


@pytest.fixture
def timed(request) -> bool:
    return not request.config.getoption("benchmark_disable")


def plain_objective(kind, dtype):
    """(x0, t, noise) -> x_t, and (prediction, x0, t, noise) -> loss, in PyTorch."""
    signal, sigma = (table.to(dtype) for table in (SCHEDULE.alpha_t, SCHEDULE.sigma_t))
    weight = None
    if KINDS[kind] != "none":
        weight = losses.weighting(SCHEDULE, kind, KINDS[kind]).float()

    def at(table, t):
        return table[t].view(-1, 1, 1, 1)

    def noised(x0, t, noise):
        return torch.addcmul(at(signal, t) * x0, at(sigma, t), noise)

    def loss(prediction, x0, t, noise):
        target = noise
        if kind == "v":
            target = torch.addcmul(at(signal, t) * noise, at(sigma, t), x0, value=-1)
        if weight is None:
            return F.mse_loss(prediction.float(), target.float())
        error = F.mse_loss(prediction.float(), target.float(), reduction="none")
        return (error.mean((1, 2, 3)) * weight[t]).mean()

    return noised, loss


def our_loss(kind):
    """(model, x0, t, noise) -> loss."""
    weight = None
    if KINDS[kind] != "none":
        weight = losses.weighting(SCHEDULE, kind, KINDS[kind])

    def loss(model, x0, t, noise):
        return losses.simple_loss(SCHEDULE, model, x0, t, noise, kind=kind, weight=weight).mean()

    return loss


def seeds(images):
    return torch.randint(2**62, (images, 2))


@pytest.mark.parametrize("noise_is", ["given", "drawn"])
@pytest.mark.parametrize("kind", KINDS)
@every_dtype
@every_shape((128, 3, 32, 32), (16, 4, 64, 64))
def bench_objective(versus, timed, shape, dtype, kind, noise_is) -> None:
    """Forward and backward into a prediction that costs nothing."""
    torch.manual_seed(0)
    x0, prediction = torch.randn(2, *shape).to(dtype)
    prediction.requires_grad_()
    t = torch.randint(1000, shape[:1])
    seed = seeds(shape[0])
    noise = ops.philox_normal(seed, 0, shape, dtype)
    noised, loss = plain_objective(kind, dtype)
    objective = our_loss(kind)
    seen = []

    def ours(z):
        def model(x_t, t):
            seen[:] = [x_t]
            return prediction

        return torch.autograd.grad(objective(model, x0, t, z), prediction)[0]

    def forward(prediction, z):
        z = torch.randn_like(x0) if z is None else z
        return noised(x0, t, z), loss(prediction, x0, t, z)

    def peer(forward):
        def run(z):
            x_t, total = forward(prediction, z)
            seen[:] = [x_t]
            return torch.autograd.grad(total, prediction)[0]

        return run

    peers = {"torch": peer(forward)}
    if timed:
        peers["inductor"] = peer(torch.compile(forward, fullgraph=True))
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for z in (noise, seed):
        gradient, x_t = ours(z), seen[0]
        for run in peers.values():
            wanted = run(noise)
            torch.testing.assert_close(x_t, seen[0], rtol=tolerance, atol=tolerance)
            assert (gradient - wanted).abs().max() <= tolerance * wanted.abs().max()
    given = noise if noise_is == "given" else None
    versus(
        (lambda: ours(noise)) if given is not None else (lambda: ours(seeds(shape[0]))),
        {name: lambda run=run: run(given) for name, run in peers.items()},
    )


@pytest.mark.parametrize("kind", KINDS)
def bench_training_step(versus, timed, kind) -> None:
    """Forward, backward, AdamW and the average of the weights, channels-last."""
    torch.manual_seed(0)
    options = SIZE if timed else TINY
    first = make_unet(channels=3, **options).to(memory_format=torch.channels_last).train()
    shape = (BATCH if timed else 2, 3, *[options["image_size"]] * 2)
    x0 = torch.rand(shape).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
    t = torch.randint(1000, shape[:1])
    noised, plain = plain_objective(kind, torch.float32)
    objective = our_loss(kind)

    def step_of(loss_of):
        """A step with a model of its own, whose loss is loss_of(model, noise)."""
        model = copy.deepcopy(first)
        averages = [p.detach().clone() for p in model.parameters()]
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

        def step(noise=None):
            loss = loss_of(model, noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                ops.ema_update(averages, parameters, torch.tensor(EMA))
            return loss.detach()

        return step

    def ours(model, noise):
        return objective(model, x0, t, seeds(shape[0]) if noise is None else noise)

    def theirs(model, noise):
        z = torch.randn_like(x0) if noise is None else noise
        return plain(model(noised(x0, t, z), t), x0, t, z)

    peers = {"reference": on_reference(step_of(theirs))}
    step = step_of(ours)
    if timed:
        peers["inductor"] = on_reference(step_of(torch.compile(theirs)))
    noise = torch.randn_like(x0)
    agreeing = [ours(first, noise), on_reference(lambda: theirs(first, noise))()]
    torch.testing.assert_close(*agreeing, rtol=1e-4, atol=1e-5)
    versus(
        step,
        peers,
        seconds=60,
        notes=lambda comparison: {"images/s": f"{shape[0] / comparison.ours:.2f}"},
    )
