"""A log-SNR that is trained beside the network."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastdiff import objectives, sde
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import META
from fastdiff.common.errors import CheckpointError, InputError
from fastdiff.losses.score_matching import diffusion_loss
from fastdiff.training.trainer import Trainer, TrainingOptions

OPTIONS = TrainingOptions(
    steps=4, batch_size=6, warmup=0, lr=0.01, sample_every=0, save_every=2, ema=0.5
)


@pytest.fixture
def make(tiny_unet, images):
    def made(out=None, **changes):
        options = dataclasses.replace(OPTIONS, **changes)
        forward = sde.LearnedLogSNR(9.0, -5.0, hidden=8)
        return Trainer(tiny_unet(), forward, images, options, out=out)

    return made


def weights(trainer):
    return torch.cat([p.detach().clone().flatten() for p in trainer.process.parameters])


@pytest.mark.parametrize("compiled", [False, True])
def test_the_process_gets_the_gradient_of_the_squared_loss(make, compiled):
    """The network that of the loss, in one backward pass, compiled or not."""
    trainer = make(compile=compiled, accumulate=2)
    draws = trainer.draw(0)
    batch, forward = trainer.batch(draws), trainer.diffusion.forward
    trainer.micro_batches.gradient(0, draws)
    losses = diffusion_loss(trainer.network, forward, batch.x0, batch.t, batch.noise)
    network = torch.autograd.grad(losses.mean(), trainer.parameters, retain_graph=True)
    process = torch.autograd.grad(losses.square().mean(), trainer.process.parameters)
    for parameters, gradients in (
        (trainer.parameters, network),
        *(([p], [one]) for p, one in zip(trainer.process.parameters, process, strict=True)),
    ):
        found = torch.cat([p.grad.flatten() for p in parameters])
        wanted = torch.cat([one.flatten() for one in gradients])
        assert wanted.abs().max() > 0
        assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_it_is_learned_resumed_and_the_same_in_micro_batches(make, images, tmp_path):
    whole, parts = make(tmp_path / "run"), make(accumulate=3)
    first = weights(whole)
    for _ in range(2):
        assert whole.step() == pytest.approx(parts.step(), rel=1e-4)
    assert not torch.allclose(weights(whole), first, atol=1e-3)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-3, atol=1e-3)
    whole.save()
    resumed = Trainer.resume(tmp_path / "run", images)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.step() == whole.step()
    assert torch.equal(weights(resumed), weights(whole))
    for one, other in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(one, other)
    assert checkpoint.load(tmp_path / "run", "raw").step == 2


def test_a_checkpoint_records_it_and_samples(make, tmp_path):
    trainer = make()
    trainer.step()
    made = trainer.checkpoint()
    checkpoint.save(made, tmp_path / "saved")
    trainer.step()
    found, t = checkpoint.load(tmp_path / "saved"), torch.linspace(0, 1, 7, dtype=torch.float64)
    assert torch.equal(found.forward.log_snr(t), made.forward.log_snr(t))
    assert not torch.equal(trainer.diffusion.forward.log_snr(t), made.forward.log_snr(t))
    sampler = found.diffusion().sampler("ddim", 2)
    assert found.sample(sampler, count=2, progress=False).isfinite().all()
    meta = json.loads((tmp_path / "saved" / META).read_text())
    meta["forward"]["weights"]["bias"] = [1.0]
    (tmp_path / "saved" / META).write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="unusable forward process"):
        checkpoint.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("prediction", "options"),
    [("v", {}), ("eps", {"weighting": "sigma"}), ("eps", {"timesteps": "laplace"})],
)
def test_it_is_learned_by_the_bound_alone(prediction, options):
    with pytest.raises(InputError, match=r"learned log-SNR|learned with the prediction eps"):
        objectives.make("dsm", sde.LearnedLogSNR(hidden=4), prediction, **options)
