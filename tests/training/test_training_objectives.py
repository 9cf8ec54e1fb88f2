"""Every objective through the trainer: it learns, resumes bit for bit, is written and read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff import schedules, sde
from fastdiff.checkpoints import checkpoint
from fastdiff.cli.sampler_options import default_sampler
from fastdiff.common.errors import InputError
from fastdiff.data.datasets import ImageSet
from fastdiff.training.trainer import Trainer, TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(20)
# Of each: the forward process, the prediction, and what else the trainer is told.
CASES = {
    "ddpm": (SCHEDULE, "v", {}),
    "hybrid": (SCHEDULE, "eps", {}),
    "vlb": (SCHEDULE, "eps", {"options": {"timestep_sampler": "loss-second-moment"}}),
    "flow": (schedules.flow(20), "flow", {"options": {"timestep_sampler": "logit-normal"}}),
    "dsm": (sde.VP(), "eps", {"options": {"timestep_sampler": "low-discrepancy"}}),
    "ncsn": (sde.VE(sigma_min=0.05, sigma_max=5.0), "ncsn", {"levels": 10}),
    "edm": (sde.EDM(sigma_max=20.0), "edm", {}),
}


@pytest.fixture
def make(tiny_unet):
    """A function that makes a trainer of one image, always with the same initial weights."""

    def trainer(name, out=None, **changes):
        forward, prediction, more = CASES[name]
        options = {
            "steps": 6, "batch_size": 8, "lr": 1e-2, "warmup": 0, "save_every": 100,
            "sample_every": 0, "lr_schedule": "constant", **more.get("options", {}), **changes,
        }  # fmt: skip
        pixels = torch.linspace(-0.8, 0.9, 64).view(1, 1, 8, 8)
        return Trainer(
            tiny_unet(learned_variance=name in ("hybrid", "vlb")), forward,
            ImageSet(pixels, name="one"), TrainingOptions(**options), prediction=prediction,
            objective=name, levels=more.get("levels"), out=out,
        )  # fmt: skip

    return trainer


@pytest.mark.parametrize("name", CASES)
def test_it_learns(name, make):
    trainer = make(name, batch_size=16, ema=0.5)
    found = [trainer.step() for _ in range(40)]
    assert np.mean(found[-8:]) < 0.6 * np.mean(found[:4])


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(name, make, tmp_path):
    # Long enough for loss-second-moment to leave its uniform beginning: 20 timesteps, 10 losses.
    steps, size = (14, 40) if name == "vlb" else (4, 8)
    whole = make(name, steps=steps, batch_size=size)
    losses = [whole.step() for _ in range(steps)]
    half = steps - 2
    parts = make(name, tmp_path, steps=steps, batch_size=size)
    for _ in range(half):
        parts.step()
    parts.save()
    torch.manual_seed(1)
    resumed = Trainer.resume(tmp_path, parts.data)
    assert resumed.diffusion.objective.name == name
    assert [resumed.step() for _ in range(steps - half)] == losses[half:]
    ours, theirs = (x.model.state_dict() for x in (resumed, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    if name == "vlb":
        assert whole.diffusion.objective.times.warm


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_is_written_read_and_drawn(name, make, tmp_path):
    trainer = make(name, tmp_path, steps=1, sample_every=1)
    trainer.run(progress=False)  # with a grid
    found = checkpoint.load(tmp_path)
    forward, prediction, more = CASES[name]
    assert repr(found.forward) == repr(forward)
    assert (found.objective, found.prediction) == (name, prediction)
    assert found.levels == more.get("levels")
    assert found.variance == trainer.diffusion.objective.variance
    method, default = default_sampler(found.diffusion())
    for chosen, steps in ((method, default and 10), ("heun", 3), ("ode", None), ("ancestral", 3)):
        if chosen == "heun" and name == "flow":
            continue  # whose first ratio of noise to signal is infinite
        options = {"rtol": 0.1, "atol": 0.1} if chosen == "ode" else {}
        sampler = found.diffusion().sampler(chosen, steps, **options)
        drawn = found.generate(sampler, count=2, batch_size=1, progress=False)
        assert drawn.images.shape == (2, 1, 8, 8)
        assert bool(drawn.images.isfinite().all()), chosen
        assert drawn.evaluations.shape == (2,)
        assert bool((drawn.evaluations >= (steps or 1)).all()), chosen


def test_what_does_not_fit_is_refused_at_once(make, tiny_unet, tmp_path):
    data = make("ddpm").data
    with pytest.raises(InputError, match=r"returns 1 channels; .* a learned variance .* return 2"):
        Trainer(tiny_unet(), SCHEDULE, data, objective="vlb")
    with pytest.raises(InputError, match=r"returns 2 channels; .* a fixed variance .* return 1"):
        Trainer(tiny_unet(learned_variance=True), SCHEDULE, data)
    with pytest.raises(InputError, match="unknown weighting 'min_snr'"):
        make("dsm", weighting="min_snr")
    with pytest.raises(InputError, match="in continuous time 'loss-second-moment'"):
        make("dsm", timestep_sampler="loss-second-moment")
    with pytest.raises(InputError, match="unknown timestep_sampler 'sobol', wanted one of default"):
        TrainingOptions(timestep_sampler="sobol")
    view = sde.Straight(20)
    Trainer(tiny_unet(), view, data, prediction="flow").step()
    with pytest.raises(InputError, match="cannot record the forward process Straight"):
        Trainer(tiny_unet(), view, data, prediction="flow", out=tmp_path)


def test_a_damaged_record_of_losses_is_refused(make, tmp_path):
    trainer = make("vlb", tmp_path)
    trainer.step()
    trainer.save()
    path = checkpoint.newest(tmp_path) / checkpoint.TRAINING
    path.write_text(path.read_text().replace('"history": 10', '"history": 3'))
    with pytest.raises(InputError, match=r"training\.json: the state has history 3"):
        Trainer.resume(tmp_path, trainer.data)
