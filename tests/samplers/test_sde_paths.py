"""Samplers on the paths of continuous-time processes: moments, orders, and the known steps of DDIM.

Data are Gaussian, and the network is the best one, which finds its time in the label it is given.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from closed_forms import Gaussian, final_moments, float64, slope
from sampler_runs import run_table

from fastdiff import samplers, schedules, sde
from fastdiff.samplers.grids import point_at_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Gaussian(0.4, 0.7)
# Each process, how a network finds its time in a label, and the sigma / alpha to run between.
PROCESSES = {
    "vp": (sde.VP(), lambda label: label / 999, (0.05, 5.0)),
    "sub-vp": (sde.SubVP(), lambda label: label / 999, (0.05, 5.0)),
    "ve": (sde.VE(), lambda label: label / 999, (0.05, 20.0)),
    "edm": (sde.EDM(), lambda label: torch.exp(4 * label), (0.05, 20.0)),
    "straight": (sde.Straight(500), lambda label: label / 500, (0.05, 20.0)),
    "cosine": (
        sde.Interpolated(schedules.cosine(1000)),
        lambda label: (label + 1) / 1000,
        (0.05, 20.0),
    ),
}
# Those left out want a consistency function, or lead to noise.
DRAW = [name for name in samplers.names() if name not in ("lcm", "consistency", "ddim-inverse")]
FIRST_ORDER = (
    "ddpm", "ddim", "euler", "euler-ancestral", "dpm-1", "dpm-2-ancestral", "dpmpp-1s",
    "dpmpp-2s-ancestral",
)  # fmt: skip
ALL = pytest.mark.parametrize("name", PROCESSES)


def on_path(name, kind="eps", timesteps=200):
    """A path, and the best model on it."""
    process, time, _ = PROCESSES[name]
    path = sde.discretize(process, timesteps)

    def network(x, label):
        alpha, sigma = process.levels(time(label[0]))
        return DATA.predict(x, alpha, sigma, kind)

    model, kind = sde.on_path(network, kind, path)
    return path, lambda x, t: model(x, float64(t)), kind


@pytest.mark.parametrize("sampler", DRAW)
@ALL
def test_samplers_draw_the_data(name, sampler):
    """From noise to images, to a few percent; what methods of first order need is more steps."""
    path, model, kind = on_path(name)
    low, high = PROCESSES[name][2]
    options = {"grid": "karras", "sigma_min": low, "sigma_max": high, "clip": None}
    steps = 200 if sampler in FIRST_ORDER else 50
    made = samplers.make(sampler, path, steps, prediction=kind, **options)
    start = DATA.moments(made.table.levels[0].tolist())
    mean, variance = final_moments(made.table, model, start)
    assert mean == pytest.approx(0.4, abs=0.01)
    assert math.sqrt(variance) == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize(
    ("sampler", "order", "options"),
    [
        ("ddim", 1, {"clip": None}),
        ("heun", 2, {}),
        ("unipc-2", 3, {"lower_order_final": False}),
    ],
)
@ALL
def test_orders(name, sampler, order, options):
    """The slope of the error against the exact solution of the probability-flow ODE."""
    (path, model, kind), (low, high) = on_path(name), PROCESSES[name][2]
    x = float64([[-30.0], [0.3], [14.0]])
    wanted = DATA.solution(x, point_at_ratio(path, high), point_at_ratio(path, low))
    between = {"grid": "logsnr", "sigma_min": low, "sigma_max": high, "final": "sigma_min"}
    counts, errors = (40, 60, 90), []
    for steps in counts:
        made = samplers.make(sampler, path, steps, prediction=kind, **between, **options)
        assert made.table.levels[0].tolist() == pytest.approx(
            [value.item() for value in path.levels(float64(high))]
        )
        errors.append((run_table(made.table, x, model=model)[-1] - wanted).abs().max().item())
    assert slope(counts, errors) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
@ALL
def test_ddim_is_the_exponential_integrator(name, kind):
    """x' = r x + (sigma' - r sigma) eps with r = alpha'/alpha: Euler's step in sigma for VE and
    EDM; and with a constant flow eps - x0, Euler's in t for the straight path."""
    path, model, _ = on_path(name, kind)
    process = path.sde
    made = samplers.make(
        "ddim", path, 6, prediction=kind, grid="uniform", clip=None, final="sigma_min"
    )
    x = float64([[-1.0], [0.5], [2.0]])
    *_, found = run_table(made.table, x, model=model)
    times = path.time(float64([*made.table.timesteps.tolist(), 0.0]))
    for s, t in pairwise(times):
        (alpha, sigma), (after, less) = process.levels(s), process.levels(t)
        eps = DATA.predict(x, alpha, sigma)
        if name in ("ve", "edm"):
            x = x + (less - sigma) * eps
        elif name == "straight":
            x = x + (t - s) * DATA.predict(x, alpha, sigma, "flow")
        else:
            x = after / alpha * x + (less - after / alpha * sigma) * eps
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)
