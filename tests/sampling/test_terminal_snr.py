"""Warnings where sampling starts from noise that the process never reaches."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastdiff import Diffusion, data, sample, samplers, schedules, sde
from fastdiff.samplers import DDIM
from fastdiff.training.trainer import Trainer, TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (2, 1, 8, 8)
NEVER = "never reaches noise: at its last timestep abar is "
LATE = r"the {} steps of ddim begin at abar = "


def half(x, t):
    return x / 2


@pytest.fixture
def loud():
    """Every warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draw(forward, **options):
    path = sde.discretize(forward) if isinstance(forward, sde.SDE) else forward
    sampler = samplers.make("ddim", path, 5, grid="trailing", prediction="v")
    return sample(half, sampler, SHAPE, progress=False, **options)


@pytest.mark.parametrize(
    ("forward", "abar"),
    [
        pytest.param(schedules.linear(50), "0.603", id="linear, 50"),
        pytest.param(schedules.linear(200), "0.132", id="linear, 200"),
        pytest.param(schedules.scaled_linear(500), "0.0682", id="scaled linear, 500"),
        pytest.param(schedules.sigmoid(100), "0.363", id="sigmoid, 100"),
        pytest.param(sde.VP(0.1, 2.0), "0.35", id="VP of little noise"),
    ],
)
def test_sampling_from_noise_warns_of_short_schedules(forward, abar):
    with pytest.warns(UserWarning, match=NEVER + abar) as told:
        draw(forward)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert "rescaled=True" in str(told[0].message)
    diffusion = Diffusion(half, forward, "v")
    with pytest.warns(UserWarning, match=NEVER + abar):  # a solver begins at the process's end
        diffusion.sample(SHAPE, method="euler-maruyama", steps=2, progress=False)


@pytest.mark.parametrize(
    "forward",
    [
        schedules.linear(),
        schedules.scaled_linear(),  # Stable Diffusion's
        schedules.sigmoid(),
        schedules.cosine(),
        schedules.cosine(5),
        schedules.linear(50, rescaled=True),
        schedules.scaled_linear(50, rescaled=True),
        schedules.make("linear", 50, zero_terminal_snr=True),
        schedules.flow(50),
        sde.VE(),
        sde.EDM(),
        sde.VE(0.05, 5.0),
        sde.SubVP(),
    ],
    ids=repr,
)
@pytest.mark.usefixtures("loud")
def test_what_ends_in_noise_says_nothing(forward):
    draw(forward)
    Diffusion(half, forward, "v").sample(SHAPE, method="dpmpp-2m", steps=5, progress=False)


@pytest.mark.usefixtures("loud")
def test_what_does_not_start_from_noise_says_nothing():
    schedule, image = schedules.linear(50), torch.zeros(SHAPE)
    draw(schedule, image=image, start=2)
    inversion = samplers.make("ddim-inverse", schedule, 5, prediction="v")
    noise = sample(half, inversion, SHAPE, x_T=image, progress=False)
    draw(schedule, x_T=noise)
    later = samplers.make("ddim", schedule, 5, prediction="v").starting_at(2)
    sample(half, later, SHAPE, progress=False)
    diffusion = Diffusion(half, schedule, "v")
    diffusion.generate(inversion, SHAPE, x_T=image, progress=False)
    diffusion.generate(diffusion.sampler("ddim", 5), SHAPE, x_T=noise, start=2, progress=False)


def test_noise_that_is_given_to_a_diffusion_counts_as_noise():
    diffusion = Diffusion(half, schedules.linear(50), "v")
    x_T = torch.randn(SHAPE)
    with pytest.warns(UserWarning, match=NEVER):
        diffusion.generate(diffusion.sampler("ddim", 5), SHAPE, x_T=x_T, progress=False)


def test_grids_that_begin_among_images():
    for steps in (1, 2):
        sampler = DDIM(schedules.cosine(1000), steps, grid=[20, 10][-steps:], prediction="v")
        for given in (sampler, sampler.table):
            with pytest.warns(UserWarning, match=LATE.format(steps)):
                sample(half, given, SHAPE, progress=False)
    with pytest.warns(UserWarning, match=LATE.format(1)):  # at timestep 0
        sample(half, DDIM(schedules.cosine(1000), 1, prediction="v"), SHAPE, progress=False)


def test_training_warns_at_its_start(tiny_unet):
    digits = data.digits("train", 8).without_labels()
    with pytest.warns(UserWarning, match=NEVER) as told:
        trainer = Trainer(tiny_unet(), schedules.linear(50), digits, TrainingOptions(batch_size=2))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step()
        Trainer(tiny_unet(), schedules.linear(50, rescaled=True), digits)
