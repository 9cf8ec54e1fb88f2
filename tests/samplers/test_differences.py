"""Where our methods differ from diffusers' on purpose: both results, and why ours is right.

Everything else agrees to rounding: see ``test_against_diffusers_*``, ``test_ddim``, ``test_ddpm``.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers_runs import (
    IMAGE,
    calm_model,
    in_double,
    only_image,
    quiet,
    run_diffusers,
    scheduler_of,
    worst,
)
from sampler_runs import run_table

from fastdiff import samplers, schedules
from fastdiff.samplers.euler_ancestral import ancestral
from fastdiff.samplers.grids import point_at_ratio, point_at_time

pytestmark = quiet
T = 1000
LINEAR = schedules.linear(T)
ZERO_SNR = schedules.rescale_zero_terminal_snr(LINEAR)


def as_v(model, path=LINEAR):
    """The same network, saying v: v = (eps - sigma x) / alpha."""

    def v(x, t):
        point = point_at_time(path, t)
        return (model(x, t) - point.sigma * x) / point.alpha

    return v


def as_x0(model, path=LINEAR):
    """The same network, saying x0."""

    def x0(x, t):
        point = point_at_time(path, t)
        return (x - point.sigma * model(x, t)) / point.alpha

    return x0


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def test_third_order_multistep_has_third_order():
    """f'' is twice the second divided difference; theirs takes it once (their singlestep, twice).

    With its first two rows given, so that the order is full from the start. For x0 = e^(-lambda/2),
    x / sigma grows by the integral of e^lambda x0.
    """

    def x0(lam):
        return torch.full((1, 1), math.exp(-lam / 2), dtype=torch.float64)

    def integral(lam):
        return 2 * math.exp(lam / 2)

    def model(x, t):
        return x0(point_at_time(LINEAR, t).lam)

    counts, errors = [40, 80, 160, 320], {"ours": [], "theirs": []}
    for steps in counts:
        sampler = samplers.make(
            "dpmpp-3m",
            LINEAR,
            steps,
            grid="logsnr",
            sigma_max=5.0,
            sigma_min=0.05,
            final="sigma_min",
            prediction="x0",
            lower_order_final=False,
        )
        points, table = sampler.points, sampler.table
        start, end = points[2], points[-1]
        x = torch.ones(1, 1, dtype=torch.float64)
        exact = x[0, 0] * end.sigma / start.sigma
        exact = exact + end.sigma * (integral(end.lam) - integral(start.lam))

        later = type(table)(
            table.name,
            table.values[2:],
            table.timesteps[2:],
            table.steps[:-2],
            table.levels[2:],
        )
        slots = [int(slot) for slot in table.column("slot")[:2]]
        known = [x0(point.lam) for point in points[:2]]
        got = run_table(later, x, model=model, history=dict(zip(slots, known, strict=True)))
        errors["ours"].append((got[-1] - exact).abs().item())

        with in_double(DPMSolverMultistepScheduler):
            scheduler = scheduler_of(
                DPMSolverMultistepScheduler,
                steps,
                prediction="x0",
                solver_order=3,
                lower_order_final=False,
                final_sigmas_type="sigma_min",
            )
            scheduler.sigmas = torch.tensor([point.ratio for point in points])
            scheduler.timesteps = sampler.timesteps[2:]
            scheduler.set_begin_index(2)
            scheduler.model_outputs, scheduler.lower_order_nums = [None, *known], 2
            got = run_diffusers(scheduler, x, model=model)
        errors["theirs"].append((got[-1] - exact).abs().item())
    assert slope(counts, errors["ours"]) == pytest.approx(3, abs=0.1), errors
    assert slope(counts, errors["theirs"]) == pytest.approx(2, abs=0.1), errors


def test_churn_comes_before_the_model(noises):
    """EDM, algorithm 2: the model sees the noisier x; theirs is asked before, at the lower level.

    Theirs then takes the old eps for that of the noisier x, and misses the only image there is.
    """
    x = noises[-1]
    options = {"s_churn": 5.0, "s_noise": 1.0}
    sampler = samplers.make("euler", LINEAR, 10, grid="trailing", **options)
    ours = run_table(sampler.table, x, noises, only_image)
    torch.testing.assert_close(ours[-1], torch.full_like(x, IMAGE), rtol=0, atol=1e-12)
    with in_double(EulerDiscreteScheduler):
        scheduler = scheduler_of(EulerDiscreteScheduler, 10, timestep_spacing="trailing")
        theirs = run_diffusers(scheduler, x, noises, only_image, **options)
    assert (theirs[-1] - IMAGE).abs().max() > 0.1
    # Each of our levels holds as much noise as it says. None is raised beyond the schedule's last.
    for row, x in enumerate(ours[:-1]):
        alpha, sigma = sampler.table.levels[row].tolist()
        assert ((x - alpha * IMAGE) / sigma).std() == pytest.approx(1, abs=0.3)
    first, second = (sampler.table.levels[:2, 1] / sampler.table.levels[:2, 0]).tolist()
    assert first == pytest.approx(scheduler.sigmas[0].item())
    assert second == pytest.approx(scheduler.sigmas[1].item() * math.sqrt(2))


@pytest.mark.parametrize(
    ("name", "scheduler_class", "theirs", "ours"),
    [
        pytest.param(
            "plms",
            PNDMScheduler,
            {"skip_prk_steps": True, "set_alpha_to_one": True},
            {},
            id="plms",
        ),
        pytest.param(
            "ddim-inverse", DDIMInverseScheduler, {"clip_sample": False}, {}, id="inverse"
        ),
    ],
)
def test_a_network_in_other_words(name, scheduler_class, theirs, ours, x_T):
    """Whether one network says eps or v of x at t, the sampler must do the same.

    PLMS: theirs takes the mean of v, and makes eps of it with the last x. DDIM's inverse: theirs
    takes v, which was said of x at the time of t, for one of the level before.
    """
    runs = {}
    with in_double(scheduler_class):
        for prediction, model in (("eps", calm_model), ("v", as_v(calm_model))):
            scheduler = scheduler_of(scheduler_class, 10, prediction=prediction, **theirs)
            runs["theirs", prediction] = run_diffusers(scheduler, x_T, model=model)
            sampler = samplers.make(name, LINEAR, 10, grid="leading", prediction=prediction, **ours)
            runs["ours", prediction] = run_table(sampler.table, x_T, model=model)
    assert worst(runs["ours", "eps"], runs["theirs", "eps"]) < 1e-12
    assert worst(runs["ours", "v"], runs["ours", "eps"]) < 1e-10
    assert worst(runs["theirs", "v"], runs["theirs", "eps"]) > 0.01


def test_the_mean_of_v_costs_plms_its_order():
    """Reference: UniPC-3 in 1000 steps."""
    x = torch.linspace(-1, 1, 5, dtype=torch.float64).view(1, 5)

    def model(x, t):
        return torch.sin(x + 0.003 * t)

    def ours(name, steps):
        sampler = samplers.make(name, LINEAR, steps, prediction="v", grid="leading")
        return run_table(sampler.table, x, model=model)[-1]

    def theirs(steps):
        options = {"skip_prk_steps": True, "set_alpha_to_one": True}
        with in_double(PNDMScheduler):
            scheduler = scheduler_of(PNDMScheduler, steps, prediction="v", **options)
            return run_diffusers(scheduler, x, model=model)[-1]

    exact, counts = ours("unipc-3", 1000), [50, 100, 200]
    their_errors = [(theirs(steps) - exact).abs().max().item() for steps in counts]
    our_errors = [(ours("plms", steps) - exact).abs().max().item() for steps in counts]
    assert slope(counts, their_errors) == pytest.approx(1, abs=0.1), their_errors
    assert slope(counts, our_errors) > 1.25, our_errors
    assert our_errors[-1] < their_errors[-1] / 30


def test_ddim_inverse_of_x0(x_T):
    """At its first step theirs divides by the image's noise, of which there is none."""
    with in_double(DDIMInverseScheduler):
        scheduler = scheduler_of(DDIMInverseScheduler, 10, prediction="x0", clip_sample=False)
        theirs = run_diffusers(scheduler, x_T, model=as_x0(calm_model))
    assert not torch.isfinite(theirs[-1]).any()
    by_x0 = samplers.make("ddim-inverse", LINEAR, 10, prediction="x0")
    by_eps = samplers.make("ddim-inverse", LINEAR, 10)
    ours = run_table(by_x0.table, x_T, model=as_x0(calm_model))
    assert worst(ours, run_table(by_eps.table, x_T, model=calm_model)) < 1e-10


def test_noise_within_a_step_of_dpmpp_sde():
    """What is left at t of the noise added from s to m: that of two exact steps of DDPM.

    Theirs takes Brownian motion in sigma without its decay, which leaves more.
    """
    sampler = samplers.make("dpmpp-sde", LINEAR, 1, grid=[500], final="sigma_min")
    (s, t), table = sampler.points, sampler.table
    m = point_at_ratio(LINEAR, math.sqrt(s.ratio * t.ratio))
    x = torch.zeros(1, 1, dtype=torch.float64)

    def constant(table, z):
        return run_table(table, x, [z, x], only_image)[-1].item()

    ours = constant(table, x + 1) - constant(table, x)
    chain = samplers.make(
        "euler-ancestral",
        LINEAR,
        2,
        grid=[500, m.t],
        final="sigma_min",
    )
    exact = constant(chain.table, x + 1) - constant(chain.table, x)
    assert ours == pytest.approx(exact, rel=1e-9)
    up = ancestral(s.ratio, t.ratio, 1.0)[1]
    theirs = t.alpha * up * math.sqrt((s.ratio - m.ratio) / (s.ratio - t.ratio))
    assert theirs > 5 * exact
    # Together with the fresh part, both have the variance of the whole step.
    fresh = table.column("noise")[1].item()
    assert math.hypot(ours, fresh) == pytest.approx(t.alpha * up, rel=1e-12)


def test_clipping_moves_eps_too(x_T):
    """By default: x = alpha x0 + sigma eps must still hold, as in OpenAI's code."""
    sampler = samplers.make("ddim", LINEAR, 10, grid="leading")
    with in_double(DDIMScheduler):
        scheduler = scheduler_of(DDIMScheduler, 10)
        theirs = run_diffusers(scheduler, x_T)[1]
    ours = run_table(sampler.table, x_T, model=calm_model)[1]
    s, t = sampler.points[:2]
    x0 = ((x_T - s.sigma * calm_model(x_T, s.t)) / s.alpha).clamp(-1, 1)
    eps = (x_T - s.alpha * x0) / s.sigma
    torch.testing.assert_close(ours, t.alpha * x0 + t.sigma * eps, rtol=1e-12, atol=1e-12)
    assert (theirs - ours).abs().max() > 0.1


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_last_step_of_ddpm_adds_no_noise(variance, noises):
    """DDPM, algorithm 2: z = 0 in the last step. Theirs asks whether t is 0, which trailing is
    not."""
    x = noises[-1]
    with in_double(DDPMScheduler):
        scheduler = scheduler_of(
            DDPMScheduler, 10, timestep_spacing="trailing", variance_type=variance
        )
        assert scheduler.timesteps[-1] == 99
        theirs = run_diffusers(scheduler, x, noises, only_image)
    sampler = samplers.make("ddpm", LINEAR, 10, grid="trailing", variance=variance)
    ours = run_table(sampler.table, x, noises, only_image)
    torch.testing.assert_close(ours[-1], torch.full_like(x, IMAGE), rtol=0, atol=1e-12)
    if variance == "fixed_large":  # the small one is 0 there
        assert (theirs[-1] - IMAGE).std() == pytest.approx(
            (1 - LINEAR.alphas_cumprod[99]).sqrt().item(), rel=0.3
        )


def test_a_learned_variance_is_a_logarithm(noises):
    """As OpenAI's code has it; theirs takes the channels for the variance itself."""
    x, log_variance = noises[-1], 0.25

    def model(x, t):
        return torch.cat([calm_model(x, t), torch.full_like(x, log_variance)], dim=1)

    def drawn(z):
        sampler = samplers.make("ddpm", LINEAR, 10, variance="learned")
        ours = run_table(sampler.table, x, z, model)[1]
        with in_double(DDPMScheduler):
            scheduler = scheduler_of(DDPMScheduler, 10, variance_type="learned")
            return ours, run_diffusers(scheduler, x, z, model)[1]

    parts = [a - b for a, b in zip(drawn(noises), drawn(0 * noises), strict=True)]
    torch.testing.assert_close(parts[0], math.exp(log_variance / 2) * noises[0])
    torch.testing.assert_close(parts[1], math.sqrt(log_variance) * noises[0])


def test_unipc_bh1_can_end_at_zero_noise(x_T):
    """B(h) = h is infinite there; a step of first order does not need it."""
    with in_double(UniPCMultistepScheduler):
        scheduler = scheduler_of(UniPCMultistepScheduler, 10, solver_type="bh1")
        theirs = run_diffusers(scheduler, x_T, model=only_image)
    assert bool(theirs[-1].isnan().all())
    sampler = samplers.make("unipc-2", LINEAR, 10, solver_type="bh1")
    ours = run_table(sampler.table, x_T, model=only_image)
    torch.testing.assert_close(ours[-1], torch.full_like(x_T, IMAGE), rtol=0, atol=1e-10)


def test_methods_in_eps_can_end_at_zero_noise(x_T):
    """By a last step of first order. Theirs refuses, or (DEIS) ends on the last level of noise."""
    with pytest.raises(ValueError, match="`final_sigmas_type` zero is not supported"):
        DPMSolverSinglestepScheduler(algorithm_type="dpmsolver", final_sigmas_type="zero")
    with in_double(DEISMultistepScheduler):
        scheduler = scheduler_of(DEISMultistepScheduler, 10)
        theirs = run_diffusers(scheduler, x_T, model=only_image)
    alpha, sigma = LINEAR.alpha_t[0].item(), LINEAR.sigma_t[0].item()
    eps = (theirs[-1] - alpha * IMAGE) / sigma
    torch.testing.assert_close(eps, only_image(x_T, T - 1), rtol=1e-6, atol=1e-6)
    for name in ("deis-2", "deis-3", "dpm-2", "dpm-3"):
        sampler = samplers.make(name, LINEAR, 10)
        ours = run_table(sampler.table, x_T, model=only_image)
        torch.testing.assert_close(ours[-1], torch.full_like(x_T, IMAGE), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "scheduler_class", "options"),
    [
        pytest.param(
            "dpm-2", DPMSolverSinglestepScheduler, {"algorithm_type": "dpmsolver"}, id="2"
        ),
        pytest.param("unipc-2", UniPCMultistepScheduler, {}, id="unipc-2"),
        pytest.param("dpmpp-2m", DPMSolverMultistepScheduler, {}, id="dpmpp-2m"),
    ],
)
def test_no_step_leads_nowhere(name, scheduler_class, options):
    """Their Karras levels end at the first one, and with final sigma_min go there twice, an
    evaluation for nothing; ours says so."""
    with in_double(scheduler_class):
        scheduler = scheduler_of(
            scheduler_class,
            16,
            use_karras_sigmas=True,
            final_sigmas_type="sigma_min",
            lower_order_final=name == "unipc-2",
            **options,
        )
        assert scheduler.sigmas[-1] == pytest.approx(scheduler.sigmas[-2].item(), rel=1e-12)
    with pytest.raises(ValueError, match="nothing to do"):
        samplers.make(name, LINEAR, 16, grid="karras", final="sigma_min")


def test_dynamic_threshold_in_eps(x_T):
    """Theirs fails; ours is their multistep class's first order (see the singlestep tests)."""
    with in_double(DPMSolverSinglestepScheduler):
        scheduler = scheduler_of(
            DPMSolverSinglestepScheduler,
            10,
            algorithm_type="dpmsolver",
            final_sigmas_type="sigma_min",
            thresholding=True,
        )
        with pytest.raises(RuntimeError, match="must match"):
            run_diffusers(scheduler, x_T)
    sampler = samplers.make("dpm-2", LINEAR, 10, dynamic_threshold=0.995, clip=(-1.0, 1.0))
    assert run_table(sampler.table, x_T, model=calm_model)[-1].abs().max() <= 1
