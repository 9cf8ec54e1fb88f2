"""What samplers refuse: every message says what was given and what was wanted."""

from __future__ import annotations

import math
import re

import pytest
import torch

from fastdiff import samplers, schedules
from fastdiff.samplers import DPMSolver, DPMSolverPPMultistep, grids

LINEAR = schedules.linear(10)
ZERO_SNR = schedules.rescale_zero_terminal_snr(LINEAR)
NAMES = samplers.names()
NAN = math.nan


def make(name="ddim", steps=5, schedule=LINEAR, **options):
    return lambda: samplers.make(name, schedule, steps, **options)


# (id, call, parts of the message)
VALUES = [
    ("unknown sampler", make("rk45"), ["unknown sampler 'rk45'", *NAMES]),
    ("unknown grid", make(grid="even"), ["unknown grid 'even'", *grids.NAMES, "or timesteps"]),
    ("unknown final", make(final="one"), ["unknown final 'one'", "zero, sigma_min"]),
    ("unknown prediction", make(prediction="epsilon"),
     ["'epsilon'", "eps, x0, v, score, flow"]),
    ("unknown variance", make("ddpm", variance="big"),
     ["'big'", "fixed_small, fixed_large, learned, learned_range"]),
    *((f"unknown solver type of {name}", make(name, solver_type="rk"),
       ["unknown solver_type 'rk'", "midpoint, heun"])
      for name in ("dpm-2", "dpmpp-2s", "dpmpp-2m", "dpmpp-2m-sde")),
    ("unknown solver type of dpmpp-3m-sde", make("dpmpp-3m-sde", solver_type="heun"),
     ["unknown solver_type 'heun'", "parabola, k-diffusion"]),
    ("unknown solver type of unipc", make("unipc-2", solver_type="midpoint"), ["bh1, bh2"]),
    ("no steps", make(steps=0), ["1..10 (the schedule's T)", "got 0"]),
    ("negative steps", make(steps=-3), ["got -3"]),
    ("steps on one timestep", make("ddim", 2, schedules.linear(1), grid="uniform"),
     ["2 steps of the uniform grid", "visit a timestep twice", "has 1"]),
    ("no steps of a grid without limit", make("heun", 0), ["from 1 on", "got 0"]),
    ("more steps than timesteps", make(steps=11), ["1..10", "got 11"]),
    *((f"fewer steps than {name} needs", make(name, steps), [f"{name} needs at least", f"{steps}"])
      for name, steps in (("dpm-2", 1), ("dpm-3", 2), ("dpmpp-2s", 1), ("dpmpp-2m", 1),
                          ("dpmpp-3m", 2), ("dpmpp-2m-sde", 1), ("dpmpp-3m-sde", 2),
                          ("unipc-2", 1), ("unipc-3", 2),
                          ("deis-2", 1), ("deis-3", 2))),
    ("order of DPM-Solver", lambda: DPMSolver(LINEAR, 5, order=4),
     ["unknown order 4", "1, 2, 3"]),
    ("order of DPM-Solver++", lambda: DPMSolverPPMultistep(LINEAR, 5, order=4),
     ["unknown order 4", "2, 3"]),
    ("order of UniPC", lambda: samplers.UniPC(LINEAR, 5, order=0), ["order 0", "1, 2, 3"]),
    ("order of DEIS", lambda: samplers.DEIS(LINEAR, 5, order=1), ["order 1", "2, 3"]),
    ("order of LMS", make("lms", order=5), ["order must lie in 1..4, got 5"]),
    *((f"eta {eta} of {name}", make(name, eta=eta), ["eta must lie in [0, 1]", f"got {eta}"])
      for name in ("ddim", "euler-ancestral", "dpm-2-ancestral", "dpm-fast", "dpmpp-2s-ancestral",
                   "dpmpp-sde") for eta in (-0.1, 1.5, NAN)),
    *((f"eta {eta} of dpmpp-2m-sde", make("dpmpp-2m-sde", eta=eta),
       ["eta must not be negative", f"got {eta}"]) for eta in (-1, NAN, math.inf)),
    *((f"s_noise of {name}", make(name, s_noise=-0.5),
       ["s_noise must not be negative", "got -0.5"])
      for name in ("euler", "heun", "kdpm-2", "euler-ancestral", "dpm-2-ancestral", "dpm-fast",
                   "dpmpp-2s-ancestral", "dpmpp-sde", "dpmpp-2m-sde", "dpmpp-3m-sde",
                   "consistency")),
    *((f"s_churn {churn} of {name}", make(name, s_churn=churn),
       ["s_churn must not be negative", f"got {churn}"])
      for name in ("euler", "heun", "kdpm-2") for churn in (-1, NAN)),
    *((f"alpha {a} of heun", make("heun", alpha=a), ["alpha must lie in", f"got {a}"])
      for a in (0, 1.5, NAN)),
    *((f"r {r} of dpmpp-sde", make("dpmpp-sde", r=r), ["r must lie in (0, 1)", f"got {r}"])
      for r in (0, 1, NAN)),
    *((f"{n} evaluations of dpm-fast", make("dpm-fast", 4, evaluations=n),
       ["4 steps take 9 to 11", f"got {n}"]) for n in (8, 12, -1)),
    ("no evaluation of dpm-fast", make("dpm-fast", 1, evaluations=0), ["take 1 to 2", "got 0"]),
    ("second order to zero noise", make("dpm-fast", 4, evaluations=11),
     ["order 1", "at most 10 evaluations, got 11"]),
    ("sigma_data of zero", make("consistency", sigma_data=0.0), ["positive", "got 0.0"]),
    ("sigma_data beside eps", make("consistency", sigma_data=0.5, prediction="eps"),
     ["a prediction of x0", "eps"]),
    ("more LCM steps than original ones", make("lcm", 6, original_steps=5),
     ["steps <= original_steps <= 10", "got 6 and 5"]),
    ("more original steps than T", make("lcm", 4, original_steps=11), ["<= 10", "got 4 and 11"]),
    *((f"clip {clip}", make(clip=clip), ["clip must be (low, high)", f"{clip}"])
      for clip in ((1, -1), (1, 1), (0, NAN), (-1, 0, 1), 1.0, "none")),
    *((f"dynamic threshold {share}", make(dynamic_threshold=share),
       ["dynamic_threshold must lie in (0, 1]", f"got {share}"]) for share in (0, -0.1, 1.01, NAN)),
    ("dynamic threshold limited below 1", make(dynamic_threshold=0.9, clip=(-0.5, 0.5)),
     ["upper limit must be at least 1", "(-0.5, 0.5)"]),
    ("grid that rises", make(steps=3, grid=[1, 5, 9]), ["must fall", "[1.0, 5.0, 9.0]"]),
    ("grid that stays", make(steps=3, grid=[9, 5, 5]), ["must fall", "5.0, 5.0"]),
    ("grid of NaN", make(steps=3, grid=[9, NAN, 2]), ["must fall", "nan"]),
    ("grid of one NaN", make(steps=1, grid=[NAN]), ["must lie in 0..9", "nan"]),
    ("grid above the range", make(steps=2, grid=[9.5, 2]), ["must lie in 0..9", "2..9.5"]),
    ("grid below the range", make(steps=2, grid=[5, -1]), ["must lie in 0..9", "-1..5"]),
    ("grid of another length", make(steps=3, grid=[9, 5]), ["steps is 3", "2 timesteps"]),
    ("empty grid", make(steps=1, grid=[]), ["steps is 1", "0 timesteps"]),
    ("grid that is a matrix", make(steps=2, grid=torch.ones(2, 2)), ["[S]", "(2, 2)"]),
    ("grid that is a number", make(steps=1, grid=torch.tensor(3)), ["[S]", "()"]),
    ("offset outside the range", make(steps=10, grid="leading", offset=1),
     ["offset 1", "0..9", "1..10"]),
    ("offset below the range", make(steps=10, grid="leading", offset=-1), ["offset -1", "-1..8"]),
    ("offset of another grid", make(grid="trailing", offset=1), ["leading grid only", "trailing"]),
    ("limits the wrong way round", make(grid="karras", sigma_min=5.0, sigma_max=1.0),
     ["sigma_min < sigma_max", "got 5 and 1"]),
    *((f"{name} of {value}", make(grid="karras", **{name: value}),
       [f"{name} must be positive", f"got {value}"])
      for name in ("sigma_min", "sigma_max", "rho") for value in (0.0, -1.0, NAN, math.inf)),
    ("a negative end", make(final="sigma_min", sigma_min=-1.0), ["sigma_min must be positive"]),
    *((f"{grid} grid without end", make("euler", schedule=ZERO_SNR, prediction="v", grid=grid),
       [grid, "zero terminal SNR", "sigma_max"])
      for grid in ("karras", "exponential", "polyexponential", "logsnr", "vp", "iddpm")),
    ("a last step with nothing to do", make(grid="leading", final="sigma_min"),
     ['final="sigma_min"', "'leading' already visits the last level"]),
    ("eps without signal", make("ddpm", 10, ZERO_SNR), ["zero signal at t = 9", "x0, v or flow"]),
    ("ratios without signal", make("heun", 5, ZERO_SNR, prediction="v", grid="trailing"),
     ["heun works with sigma / alpha", "t = 9", "take ddim"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "parts"), [pytest.param(call, parts, id=id_) for id_, call, parts in VALUES]
)
def test_values(call, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        call()
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_named(name):
    with pytest.raises(TypeError, match="'temperature'"):
        samplers.make(name, LINEAR, 5, temperature=2.0, **({"grid": "trailing"}))


@pytest.mark.parametrize(
    ("name", "option"),
    [
        pytest.param("dpmpp-2m", "eta", id="eta of an ODE's sampler"),
        pytest.param("ddim", "s_churn", id="churn of ddim"),
        pytest.param("euler", "solver_type", id="solver type of euler"),
        pytest.param("unipc-2", "s_noise", id="noise of unipc"),
    ],
)
def test_an_option_of_another_sampler_is_named(name, option):
    with pytest.raises(TypeError, match=f"'{option}'"):
        samplers.make(name, LINEAR, 5, **{option: 0.5})


@pytest.mark.parametrize("steps", [5.0, "5", None], ids=repr)
def test_steps_are_whole_numbers(steps):
    with pytest.raises(TypeError, match=f"steps must be a whole number, got {steps!r}"):
        samplers.make("ddim", LINEAR, steps)


@pytest.mark.parametrize("start", [-1, 5, 100], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_start_outside_the_run(name, start):
    options = {"original_steps": 10} if name == "lcm" else {}
    sampler = samplers.make(name, LINEAR, 5, **options)
    with pytest.raises(ValueError, match=rf"must lie in 0\.\.4, got {start}"):
        sampler.starting_at(start)
