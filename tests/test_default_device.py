"""Under torch.set_default_device, and in inference mode, everything is what it is elsewhere.

The meta device stands for a GPU: a tensor that is made there by mistake has no values.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from fastdiff import Diffusion, guidance, losses, process, sample, samplers, schedules
from fastdiff.losses import score_matching, timesteps

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastdiff. .* never reaches noise"),
]

MAKE = {
    **{name: lambda name=name: schedules.make(name, 20) for name in schedules.NAMES},
    "rescaled": lambda: schedules.linear(20, rescaled=True),
    "zero terminal SNR": lambda: schedules.make("linear", 20, zero_terminal_snr=True),
    "respaced": lambda: schedules.cosine(40).respaced(torch.arange(0, 40, 2, device="cpu")),
    "flow": lambda: schedules.flow(20, 3.0),
}
SHAPE = (3, 2, 4, 4)
ALL = pytest.mark.parametrize("name", MAKE)


@contextmanager
def elsewhere():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)  # "cpu" would leave a mode behind, which graphs depend on


def half(x, t, **cond):
    return x / 2


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def everything(make):
    """Tensors that a schedule, its samplers, losses and runs give."""
    schedule, t = make(), torch.tensor([0, 7, 19], device="cpu")
    x0, eps = noise(*SHAPE), noise(*SHAPE).flip(0)
    found = [schedule.alpha_t, schedule.sigma_t, schedule.snr, schedule.lambda_t]
    if isinstance(schedule, schedules.NoiseSchedule):
        found += [schedule.posterior_log_variance_clipped, schedule.posterior_mean_coef_xt]
        found += process.q_posterior(schedule, x0, eps, t)
        found += [losses.vlb_loss(schedule, half, x0, t, eps, kind="x0", variance="fixed_small")]
    for name in samplers.names():
        options = {"original_steps": 20} if name == "lcm" else {}
        options |= (
            {"grid": "leading", "prediction": "x0"} if name != "lcm" else {"prediction": "x0"}
        )
        if name == "lcm" and schedule.has_zero_terminal_snr:
            continue
        found += [samplers.make(name, schedule, 5, **options).table.values]
    for grid in samplers.grids.NAMES:
        of_ratios = ("karras", "exponential", "polyexponential", "logsnr", "vp", "iddpm")
        limits = {"sigma_min": 0.05, "sigma_max": 20.0} if grid in of_ratios else {}
        made = samplers.make("ddim", schedule, 4, grid=grid, prediction="x0", **limits)
        found += [made.table.levels, samplers.Table.from_json(made.table.to_json()).values]
    for kind in process.KINDS:
        found += [process.target(schedule, x0, t, eps, kind)]
        found += [process.to_x0(schedule, x0, t.clamp(max=5), eps, kind)]
        found += [losses.simple_loss(schedule, half, x0, t, eps, kind=kind)]
    guided = guidance.classifier_guided(half, lambda x, t: x.sum((1, 2, 3)), schedule, kind="x0")
    for name in ("ddpm", "ddim", "heun"):
        sampler = samplers.make(name, schedule, 4, grid="leading", prediction="x0")
        run = {"progress": False, "device": "cpu", "seed": 3}
        found += sample(
            guided, sampler, SHAPE, return_trajectory=True, preview=lambda *_: None, **run
        )
        mask = torch.ones(1, 1, 4, 4, device="cpu")
        found += [sample(half, sampler, SHAPE, image=x0, mask=mask, resamplings=2, jump_length=2,
                         max_batch=2, **run)]  # fmt: skip
    generator = torch.Generator("cpu").manual_seed(1)
    found += [Diffusion(half, schedule, "x0").loss(x0, generator=generator)]
    return found


@ALL
def test_the_default_device_changes_nothing(name):
    wanted = everything(MAKE[name])
    with elsewhere():
        found = everything(MAKE[name])
    for one, other in zip(found, wanted, strict=True):
        assert one.device.type == "cpu"
        assert torch.equal(one, other)


def test_without_any_device_images_are_on_the_default_one():
    sampler = samplers.make("ddim", schedules.cosine(20), 4)
    with elsewhere():
        assert sample(lambda x, t: x, sampler, SHAPE, device=None, x_T=noise(*SHAPE),
                      progress=False).device.type == "cpu"  # fmt: skip
        parameter = torch.nn.Linear(1, 1, device="cpu")
        parameter.forward = lambda x, t: x / 2
        assert sample(parameter, sampler, SHAPE, progress=False).device.type == "cpu"


def test_times_are_drawn_where_the_generator_is():
    kinds = (timesteps.Uniform, timesteps.LowDiscrepancy, timesteps.LogitNormal,
             timesteps.LossSecondMoment)  # fmt: skip

    def drawn():
        found = []
        for kind in kinds:
            made = kind(10)
            for generator in (None, torch.Generator("cpu").manual_seed(2)):
                t, weights = made.draw(5, generator)
                found.append((t.device.type, weights.device.type))
        sigma = score_matching.log_normal_sigma(4)
        return [*found, (sigma.device.type, score_matching.geometric_sigmas(2, 1, 3).device.type)]

    with elsewhere():
        assert set(drawn()) == {("cpu", "cpu")}


@ALL
def test_what_inference_mode_has_made_can_be_trained_with(name):
    """A schedule made and first used in inference mode, and then by a backward pass."""
    with torch.inference_mode():
        betas = torch.linspace(0.01, 0.3, 20)
        schedule, own = MAKE[name](), schedules.NoiseSchedule(betas)
        for path in (schedule, own):
            losses.simple_loss(path, half, noise(*SHAPE), torch.tensor([0, 7, 19]), noise(*SHAPE))
            process.to_x0(path, noise(*SHAPE), torch.tensor([0, 7, 9]), noise(*SHAPE), "v")
            path.coefficients(torch.device("cpu"), torch.float64)
            assert path.snr.isfinite().all()
    t = torch.tensor([0, 7, 9])
    for path in (schedule, own):
        for kind in process.KINDS:
            scale = torch.ones(1, requires_grad=True, dtype=torch.float64)
            x0 = noise(*SHAPE).double()
            loss = losses.simple_loss(path, lambda x, t: x * scale, x0, t, x0, kind=kind)  # noqa: B023
            x_t = process.q_sample(path, x0, t, x0)
            found = process.to_x0(path, x_t, t, x_t * scale, kind)
            (loss.sum() + found.sum()).backward()
            assert scale.grad is not None
