"""Runs of diffusers' schedulers that can be laid beside ours.

diffusers computes its tables in float32, whatever the images. ``in_double`` has a scheduler's
module read float32 as float64, from its betas to its last sum, so that a difference beyond rounding
is one of method. Schedulers in the way of k-diffusion keep x / alpha and scale the model's input;
``run_diffusers`` returns x in our scale, x = alpha x0 + sigma eps.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from sampler_runs import PREDICTIONS, run_table

from fastdiff import ops, samplers, schedules
from fastdiff.samplers.grids import point_at_time

PREDICTION_TYPES = {**PREDICTIONS, "flow": "flow_prediction"}
# Our schedules and the options of theirs. With T - 1 = lcm(9, 24, 49), 10, 25 and 50 timesteps from
# T - 1 to 0 are whole numbers; between whole numbers, they interpolate otherwise.
FINE = {"beta_start": 1e-4 / 3.529, "beta_end": 0.02 / 3.529}
SCHEDULES = {
    "linear": (
        schedules.linear(),
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    ),
    "scaled_linear": (
        schedules.scaled_linear(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (schedules.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    "fine": (
        schedules.linear(3529, **FINE),
        {"num_train_timesteps": 3529, "beta_schedule": "linear", **FINE},
    ),
    "flow": (
        schedules.flow(1001, shift=3),
        {"num_train_timesteps": 1001, "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    "flow_match": (schedules.flow(3529), {"num_train_timesteps": 3529}),
}
GRIDS = {  # our options and theirs
    "leading": ({"grid": "leading"}, {"timestep_spacing": "leading"}),
    "leading-offset": (
        {"grid": "leading", "offset": 1},
        {"timestep_spacing": "leading", "steps_offset": 1},
    ),
    "trailing": ({"grid": "trailing"}, {"timestep_spacing": "trailing"}),
    "linspace": ({"grid": "linspace"}, {"timestep_spacing": "linspace"}),
}
quiet = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
steps_10_25_50 = pytest.mark.parametrize("steps", [10, 25, 50], ids="{} steps".format)
every_spacing = pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
spaced_steps = pytest.mark.parametrize(
    ("spacing", "steps"),
    [(spacing, steps) for spacing in ("leading", "trailing", "linspace") for steps in (10, 25, 50)],
    ids="{}".format,
)
every_prediction = pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
both_solvers = pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
uneven_levels = pytest.mark.parametrize("grid", ["karras", "exponential"])
IN_RATIOS = (  # schedulers that keep x / alpha
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverSDEScheduler",
)


def calm_model(x, t):
    """A model whose runs neither shrink nor blow up rounding errors much."""
    return 0.9 * torch.sin(x + 0.01 * t)


IMAGE = 0.7


def only_image(x, t):
    """eps for linear betas where all data is IMAGE: a run must have its level all the way."""
    point = point_at_time(SCHEDULES["linear"][0], t)
    return (x - point.alpha * IMAGE) / point.sigma


def timeless_model(x, t):
    """One that does not look at t, where theirs is rounded."""
    return calm_model(x, 300.0)


class _Double:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name):
        return getattr(self._module, name)


@contextmanager
def in_double(scheduler_class):
    """Within it, the class's module computes in float64 where it says float32."""
    module = sys.modules[scheduler_class.__module__]
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        for name, whole in (("torch", torch), ("np", np)):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, _Double(whole)))
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float64)
        yield


def scheduler_of(scheduler_class, steps, *, schedule="linear", prediction="eps", **options):
    """One of theirs, ready for ``steps`` steps of a schedule of SCHEDULES.

    ``steps`` may be the keyword arguments of its ``set_timesteps``.
    """
    options = {**SCHEDULES[schedule][1], **options}
    if "prediction_type" in inspect.signature(scheduler_class.__init__).parameters:
        options["prediction_type"] = PREDICTION_TYPES[prediction]
    scheduler = scheduler_class(**options)
    scheduler.set_timesteps(
        **(steps if isinstance(steps, dict) else {"num_inference_steps": steps})
    )
    return scheduler


def run_diffusers(scheduler, x, noises=None, model=calm_model, *, before=None, **step_options):
    """Every x of a run from ``x``, [R + 1, ...], in our scale.

    Args:
        scheduler: one with its timesteps set.
        x: what to begin with.
        noises: the noise of each row, which takes the place of what they draw.
        model: a function of x and t.
        before: called with the scheduler and the row before each step.
        **step_options: of the scheduler's ``step``.
    """
    in_ratios = type(scheduler).__name__ in IN_RATIOS
    module = sys.modules[type(scheduler).__module__]
    scales = hasattr(scheduler, "scale_model_input")
    path = []
    if in_ratios:
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for i, t in enumerate(scheduler.timesteps):
        if before is not None:
            before(scheduler, i)
        path.append(scheduler.scale_model_input(x, t) if scales else x)
        z = None if noises is None else noises[i]
        with mock.patch.object(module, "randn_tensor", lambda *_, z=z, **__: z, create=True):
            out = model(path[-1], t.item())
            x = scheduler.step(out, t, x, **step_options).prev_sample
    path.append(x / (scheduler.sigmas[-1] ** 2 + 1) ** 0.5 if in_ratios else x)
    return torch.stack(path)


def visited(scheduler):
    """Their timesteps as an explicit grid of ours: those of two evaluations in a row, once."""
    return torch.unique_consecutive(scheduler.timesteps).to(torch.float64)


def run_operation(table, x, noises=None, model=calm_model):
    """Every x of a run from ``x``, [R + 1, ...], by the library's operation in x's dtype."""
    values, history = table.values.to(x.dtype), ops.new_history(x, table.depth)
    history = history if table.depth else None
    path = [x]
    for i, t in enumerate(table.timesteps.tolist()):
        z = None if noises is None else noises[i]
        out = model(path[-1], t)
        path.append(ops.sampler_step(path[-1], out, history, z, values, torch.tensor(i)))
    return torch.stack(path)


def relative(x, y):
    """Norm of the difference of two runs' results over the norm."""
    return worst(x[-1:], y[-1:])


def worst(x, y):
    """The same, at its largest over all rows of two runs."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    return ((x - y).norm(dim=1) / y.norm(dim=1)).max().item()


def assert_agree(
    scheduler_class,
    name,
    x,
    noises=None,
    *,
    steps,
    schedule="linear",
    prediction="eps",
    model=calm_model,
    before=None,
    step_options=None,
    theirs=None,
    their_steps=None,
    ours=None,
):
    """Our sampler and their scheduler take x the same way.

    In float64 every x of the run agrees to rounding. In float32, run by our operation, ours is
    within 1e-5 of theirs in float64, and within 1e-5 of their float32 wherever that itself is.

    Args:
        scheduler_class, name: theirs and ours.
        x, noises: float64.
        steps, schedule, prediction, model: for both.
        before, step_options: see :func:`run_diffusers`.
        theirs: options of their class.
        their_steps: arguments of their ``set_timesteps``, if not just ``steps``.
        ours: options of our sampler; without a ``grid`` it visits their timesteps.

    Returns:
        Their scheduler and our sampler.
    """
    keywords = {"schedule": schedule, "prediction": prediction, **(theirs or {})}
    run = {"model": model, "before": before, **(step_options or {})}
    their_steps = their_steps or steps
    with in_double(scheduler_class):
        scheduler = scheduler_of(scheduler_class, their_steps, **keywords)
        wanted = run_diffusers(scheduler, x, noises, **run)
    ours = {"grid": visited(scheduler), **(ours or {})}
    sampler = samplers.make(name, SCHEDULES[schedule][0], steps, prediction=prediction, **ours)
    got = run_table(sampler.table, x, noises, model)
    error = worst(got, wanted)
    assert error < 1e-11, f"float64: {error:.1e}"

    x, noises = x.float(), None if noises is None else noises.float()
    stock = run_diffusers(scheduler_of(scheduler_class, their_steps, **keywords), x, noises, **run)
    single = run_operation(sampler.table, x, noises, model)
    error, their_error = relative(single, wanted), relative(stock, wanted)
    assert error < 1e-5, f"float32 against float64: {error:.1e}, theirs {their_error:.1e}"
    error = relative(single, stock)
    assert error < max(1e-5, 1.5 * their_error), f"float32: {error:.1e}, theirs {their_error:.1e}"
    return scheduler, sampler
