"""Every scheduler of ``fastdiff.diffusers`` takes the steps of the class it replaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from scheduler_runs import SHAPE, assert_same, pair, run

import fastdiff.diffusers

SCHEDULERS = [name for name in fastdiff.diffusers.__all__ if name.endswith("Scheduler")]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SIGMAS = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
)

CASES = [
    *(("DDPMScheduler", {"prediction_type": p}) for p in PREDICTIONS),
    *(
        ("DDPMScheduler", {"variance_type": v})
        for v in ("fixed_small", "fixed_small_log", "fixed_large")
    ),
    ("DDPMScheduler", {"thresholding": True}),
    ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    ("DDPMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    *(("DDIMScheduler", {"prediction_type": p}) for p in PREDICTIONS),
    *(("DDIMScheduler", {"timestep_spacing": s}) for s in ("linspace", "leading", "trailing")),
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    # with an alpha of 1 at the start, diffusers divides by 0 for a model that predicts x0
    *(
        ("DDIMInverseScheduler", {"prediction_type": p, "set_alpha_to_one": False})
        for p in PREDICTIONS
    ),
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "linspace"}),
    *(("LMSDiscreteScheduler", {"prediction_type": p}) for p in PREDICTIONS),
    *(("LMSDiscreteScheduler", sigmas) for sigmas in SIGMAS),
    *(("EulerDiscreteScheduler", {"prediction_type": p}) for p in PREDICTIONS),
    *(("EulerDiscreteScheduler", sigmas) for sigmas in SIGMAS),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("EulerAncestralDiscreteScheduler", {"rescale_betas_zero_snr": True}),
    *(("HeunDiscreteScheduler", {"prediction_type": p}) for p in PREDICTIONS),
    ("HeunDiscreteScheduler", {"clip_sample": True, "beta_schedule": "exp"}),
    *(("HeunDiscreteScheduler", sigmas) for sigmas in SIGMAS),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {"prediction_type": "v_prediction", "use_karras_sigmas": True}),
    *(
        ("DPMSolverSinglestepScheduler", {"solver_order": order, "solver_type": solver, **more})
        for order in (1, 2, 3)
        for solver in ("midpoint", "heun")
        for more in (
            {},
            {"algorithm_type": "sde-dpmsolver++"},
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        )
    ),
    *(("DPMSolverSinglestepScheduler", {"prediction_type": p}) for p in PREDICTIONS),
    ("DPMSolverSinglestepScheduler", {"thresholding": True, "lower_order_final": True}),
    *(
        ("DPMSolverMultistepScheduler", {"solver_order": order, "solver_type": solver, **more})
        for order in (1, 2, 3)
        for solver in ("midpoint", "heun")
        for more in (
            {},
            {"algorithm_type": "sde-dpmsolver++"},
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        )
    ),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    *(("DPMSolverMultistepScheduler", {"prediction_type": p}) for p in PREDICTIONS),
    *(("DPMSolverMultistepScheduler", sigmas) for sigmas in SIGMAS),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", {"euler_at_final": True, "thresholding": True}),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
    *(
        ("UniPCMultistepScheduler", {"solver_order": order, "solver_type": solver, **more})
        for order in (1, 2, 3)
        for solver in ("bh1", "bh2")
        for more in ({}, {"predict_x0": False})
    ),
    *(("UniPCMultistepScheduler", {"prediction_type": p}) for p in PREDICTIONS),
    *(("UniPCMultistepScheduler", sigmas) for sigmas in SIGMAS),
    ("UniPCMultistepScheduler", {"disable_corrector": [0, 1], "thresholding": True}),
    *(("DEISMultistepScheduler", {"solver_order": order}) for order in (1, 2, 3)),
    *(("DEISMultistepScheduler", {"prediction_type": p}) for p in PREDICTIONS),
    ("DEISMultistepScheduler", {"thresholding": True}),
    *(("LCMScheduler", {"prediction_type": p}) for p in PREDICTIONS),
    ("LCMScheduler", {"clip_sample": True}),
    *(("TCDScheduler", {"prediction_type": p}) for p in PREDICTIONS),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_schedule": "exponential"}),
    *(("EDMDPMSolverMultistepScheduler", {"solver_order": order}) for order in (1, 2, 3)),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("EDMDPMSolverMultistepScheduler", {"thresholding": True}),
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    ("ScoreSdeVeScheduler", {}),
]  # fmt: skip


def on_table(scheduler) -> bool:
    return any(scheduler._plans.values())


def has_table(name, dtype) -> bool:
    """Whether steps can be rows: of this class's, float32 comes out of float16 and bfloat16."""
    return name != "ScoreSdeVeScheduler" or dtype in (torch.float32, torch.float64)


def compare(name, config, **arguments):
    """Whether the run of ours was on a table, after it was found equal to diffusers'."""
    ours, stock = pair(name, **config)
    made = run(ours, **arguments)
    tabled = on_table(ours)
    exact = None
    if arguments.get("dtype") is not torch.float64:
        exact = run(pair(name, **config)[1], exactly=True, **arguments)
    assert_same(made, run(stock, **arguments), exact)
    return tabled


@pytest.mark.parametrize(
    ("name", "config"),
    CASES,
    ids=[f"{n}-{'-'.join(map(str, c.values())) or 'default'}" for n, c in CASES],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_steps_are_those_of_diffusers(name, config, dtype) -> None:
    assert compare(name, config, dtype=dtype) == has_table(name, dtype)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [5, 10, 50])
def test_steps_and_dtypes(name, steps, dtype) -> None:
    assert compare(name, {}, steps=steps, dtype=dtype) == has_table(name, dtype)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EDMEulerScheduler"])
def test_x0_is_float32_for_bfloat16_images(name) -> None:
    """As diffusers gives it: not a bfloat16 number in a float32 tensor."""
    ours, _ = pair(name)
    for _, x0 in run(ours, dtype=torch.bfloat16).steps:
        assert not torch.equal(x0, x0.bfloat16().float())


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_ratios_of_dynamic_thresholding(ratio) -> None:
    config = {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": 9.0}
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler"):
        assert compare(name, config) == (ratio > 0)  # a table's 0 stands for fixed limits


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n != "PNDMScheduler"])
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(name, steps) -> None:
    compare(name, {}, steps=steps)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"eta": 1.0}),
        ("DDIMScheduler", {"eta": 0.3, "use_clipped_model_output": True}),
        (
            "EulerDiscreteScheduler",
            {"s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.01},
        ),
        ("EDMEulerScheduler", {"s_churn": 2.0}),
        ("FlowMatchEulerDiscreteScheduler", {"s_churn": 2.0}),
        ("LMSDiscreteScheduler", {"order": 2}),
        ("TCDScheduler", {"eta": 0.0}),
        ("TCDScheduler", {"eta": 1.0}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options_of_the_step(name, options, dtype) -> None:
    assert compare(name, {}, options=options, dtype=dtype)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_variance_that_the_model_predicts(variance) -> None:
    channels = 8 if variance == "learned_range" else 4
    assert compare("DDPMScheduler", {"variance_type": variance}, channels=channels)


@pytest.mark.parametrize("name", ["DPMSolverSinglestepScheduler", "DPMSolverMultistepScheduler"])
def test_variance_that_is_dropped(name) -> None:
    assert compare(name, {"variance_type": "learned_range"}, shape=(2, 3, 6, 5), channels=6)


@pytest.mark.parametrize(
    ("name", "config", "timing"),
    [
        ("DDPMScheduler", {}, {"timesteps": [901, 500, 77, 3]}),
        ("EulerDiscreteScheduler", {}, {"timesteps": [901, 500, 77, 3]}),
        ("EulerDiscreteScheduler", {}, {"sigmas": [10.0, 3.0, 1.0, 0.2, 0.0]}),
        ("HeunDiscreteScheduler", {}, {"timesteps": [901, 500, 77, 3]}),
        ("DPMSolverMultistepScheduler", {}, {"timesteps": [901, 500, 77, 3]}),
        ("LCMScheduler", {}, {"timesteps": [901, 500, 77, 3]}),
        ("TCDScheduler", {}, {"timesteps": [901, 500, 77, 3]}),
        ("FlowMatchEulerDiscreteScheduler", {}, {"sigmas": [1.0, 0.7, 0.2]}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
         {"sigmas": np.array([1.0, 0.7, 0.5, 0.2])}),
    ],
)  # fmt: skip
def test_grids_that_are_given(name, config, timing) -> None:
    assert compare(name, config, timing=timing)


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n not in ("ScoreSdeVeScheduler",)])
def test_runs_that_begin_later(name) -> None:
    begins = hasattr(getattr(fastdiff.diffusers, name), "set_begin_index")
    if name != "PNDMScheduler":  # whose times are not the grid's from the middle on
        assert compare(name, {}, steps=10, start=4)
    if begins:
        assert compare(name, {}, steps=10, start=4, begin=4)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        (SHAPE, torch.channels_last),
        ((1, 3, 7), torch.contiguous_format),
        ((2, 3, 2, 4, 4), torch.channels_last_3d),
    ],
    ids=str,
)
def test_shapes_and_layouts(name, shape, memory_format) -> None:
    arguments = {"shape": shape, "memory_format": memory_format}
    assert compare(name, {}, **arguments)
    made, theirs = (run(one, **arguments).steps for one in pair(name))
    for one, other in zip(made, theirs, strict=True):
        assert one[0].stride() == other[0].stride()


def test_ddim_takes_its_next_time_from_the_grid() -> None:
    """Against the update of arXiv:2010.02502, eq. 12, between the times of the grid."""
    ours = fastdiff.diffusers.DDIMScheduler(
        timestep_spacing="linspace", clip_sample=False, strict_compat=False
    )
    ours.set_timesteps(7)
    x, eps = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(2))
    for t, after in zip(ours.timesteps, [*ours.timesteps[1:], None], strict=True):
        a = ours.alphas_cumprod[t].double()
        b = torch.tensor(1.0) if after is None else ours.alphas_cumprod[after].double()
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        wanted = b.sqrt() * x0 + (1 - b).sqrt() * eps
        got = ours.step(eps, t, x).prev_sample
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
        needs = x.clone().requires_grad_()  # which runs without a table
        torch.testing.assert_close(
            ours.step(eps, t, needs).prev_sample.detach(), wanted, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    "name",
    ["DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "EulerDiscreteScheduler",
     "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler",
     "UniPCMultistepScheduler", "DEISMultistepScheduler"],
)  # fmt: skip
def test_trailing_spacing_has_as_many_times_as_steps(name) -> None:
    for steps in range(1, 60):
        better = getattr(fastdiff.diffusers, name)(timestep_spacing="trailing", strict_compat=False)
        better.set_timesteps(steps)
        times = better.timesteps.tolist()
        assert len(times) == steps
        assert max(times) == 999
        assert min(times) >= 0
        if hasattr(better, "sigmas"):
            assert len(better.sigmas) == steps + 1
    assert better.timesteps.device.type == "cpu"


def test_leading_spacing_stays_within_the_training_times() -> None:
    better = fastdiff.diffusers.DDPMScheduler(steps_offset=1, strict_compat=False)
    better.set_timesteps(1000)
    assert better.timesteps.tolist() == list(range(999, -1, -1))


def test_variance_at_the_last_time() -> None:
    strict, better = (
        fastdiff.diffusers.DDPMScheduler(strict_compat=compat) for compat in (True, False)
    )
    assert float(strict._get_variance(0)) == pytest.approx(1e-20)
    assert torch.equal(better._get_variance(0), strict._get_variance(1))
    assert torch.equal(better._get_variance(5), strict._get_variance(5))


def test_the_corrector_of_the_sde() -> None:
    ours, stock = pair("ScoreSdeVeScheduler")
    x, score = torch.randn(SHAPE), torch.randn(SHAPE)
    made = []
    for one in (ours, stock):
        one.set_timesteps(5)
        generator = torch.Generator().manual_seed(0)
        made.append(one.step_correct(score, x, generator=generator).prev_sample)
    torch.testing.assert_close(*made)
