"""Orders of convergence: the error against the true solution falls as S to the minus order.

The model is the best one for a mixture of Gaussians, in closed form, so the error is the sampler's.
Runs go between two levels of noise, since a last step to none is of first order for any method. The
slope of log error over log S is fitted over several S, as diffrax does.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from closed_forms import slope, three_clouds, two_bumps
from sampler_runs import run_table

from fastdiff import process, samplers, schedules
from fastdiff.samplers import COLUMNS
from fastdiff.samplers.grids import Point, point_at_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

LOW, HIGH = 0.05, 5.0  # sigma / alpha
BETWEEN = {"grid": "logsnr", "sigma_min": LOW, "sigma_max": HIGH, "final": "sigma_min"}
COUNTS = (36, 54, 81, 120)
LATER = (96, 144, 216)
MARGIN = 0.2  # of a fitted slope
PATHS = {"linear": schedules.linear(), "flow": schedules.flow()}
DATA = {1: two_bumps(), 2: three_clouds(2), 64: three_clouds(64)}

NO_NOISE = {"eta": 0.0}
FULL = {"lower_order_final": False}
# Every sampler of the registry whose run is a deterministic function of x_T, or can be made one,
# and its order.
ORDERS = {
    "ddim": (1, {"clip": None}),
    "ddim-inverse": (1, {}),
    "euler": (1, {}),
    "euler-ancestral": (1, NO_NOISE),
    "dpm-1": (1, {}),
    "dpmpp-1s": (1, {}),
    "plms": (2, {}),  # its weights are those of even steps in sigma / alpha, which these are not
    "heun": (2, {}),
    "kdpm-2": (2, {}),
    "dpm-2-ancestral": (2, NO_NOISE),
    "dpmpp-2s-ancestral": (2, NO_NOISE),
    "dpm-2": (2, FULL),
    "dpmpp-2s": (2, FULL),
    "dpmpp-2m": (2, FULL),
    "deis-2": (2, FULL),
    "dpmpp-sde": (2, NO_NOISE),
    "dpmpp-2m-sde": (2, NO_NOISE | FULL),
    "dpm-3": (3, FULL),
    "unipc-1": (2, FULL),
    "unipc-2": (3, FULL),
    "unipc-3": (4, FULL),
}
# Orders that the low ones of the first steps hide: those steps are taken from the true solution.
# (name, steps that are so, order, options)
STARTED = {
    "dpmpp-3m": ("dpmpp-3m", 2, 3, FULL),
    "dpmpp-3m-sde": ("dpmpp-3m-sde", 2, 3, NO_NOISE | FULL),
    "deis-3": ("deis-3", 2, 3, FULL),
    "lms": ("lms", 3, 4, {}),
    "lms of order 3": ("lms", 2, 3, {"order": 3}),
    "lms of order 2": ("lms", 1, 2, {"order": 2}),
    "unipc-3": ("unipc-3", 2, 4, FULL | {"disable_corrector": (0, 1)}),  # the truth needs none
}
LAST_IS_LOWER = {"dpm-fast"}  # whose evaluations depend on S: see the test of its order
RANDOM = {"ddpm", "lcm", "consistency"}  # of their own: see test_distributions


@cache
def problem(dimensions, path):
    """Where the run starts, x there, and the true x at the end."""
    path, mixture = PATHS[path], DATA[dimensions]
    start, end = point_at_ratio(path, HIGH), point_at_ratio(path, LOW)
    x = mixture.draw(8, torch.Generator().manual_seed(7), start.alpha, start.sigma)
    return mixture, x, mixture.solve(x, start, end)


def distance(x, y):
    return (x - y).square().mean().sqrt().item()


def errors(name, counts, *, dimensions=1, path="linear", kind="eps", **options):
    """The error of a whole run for each number of steps."""
    mixture, x, wanted = problem(dimensions, path)
    if name == "ddim-inverse":
        x, wanted = wanted, x
    model = mixture.model(PATHS[path], kind)
    found = []
    for steps in counts:
        sampler = samplers.make(name, PATHS[path], steps, prediction=kind, **BETWEEN | options)
        found.append(distance(run_table(sampler.table, x, model=model)[-1], wanted))
    return found


def test_every_sampler_has_its_order_here():
    started = {name for name, *_ in STARTED.values()}
    assert set(ORDERS) | started | LAST_IS_LOWER | RANDOM == set(samplers.names())


@pytest.mark.parametrize("dimensions", DATA, ids="{}-d".format)
def test_the_true_solution_is_one(dimensions):
    """Runge-Kutta of another library and a sampler of fourth order agree, so that neither is
    wrong."""
    (error,) = errors("unipc-3", [400], dimensions=dimensions, **FULL)
    assert error < 1e-8


@pytest.mark.parametrize("dimensions", DATA, ids="{}-d".format)
def test_the_model_is_the_gradient_of_the_log_density(dimensions):
    mixture, (alpha, sigma) = DATA[dimensions], (0.8, 0.6)
    x = mixture.draw(5, torch.Generator().manual_seed(1), alpha, sigma).requires_grad_()
    each = torch.distributions.MultivariateNormal(
        alpha * mixture.means,
        alpha**2 * mixture.axes @ torch.diag_embed(mixture.variances) @ mixture.axes.mT
        + sigma**2 * torch.eye(dimensions, dtype=torch.float64),
    )
    weights = torch.distributions.Categorical(mixture.weights)
    density = torch.distributions.MixtureSameFamily(weights, each)
    density.log_prob(x).sum().backward()
    found = {kind: mixture.predict(x.detach(), alpha, sigma, kind) for kind in process.KINDS}
    torch.testing.assert_close(found["score"], x.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(alpha * found["x0"] + sigma * found["eps"], x.detach())
    torch.testing.assert_close(found["v"], alpha * found["eps"] - sigma * found["x0"])
    torch.testing.assert_close(found["flow"], found["eps"] - found["x0"])


@pytest.mark.parametrize("dimensions", DATA, ids="{}-d".format)
@pytest.mark.parametrize("name", ORDERS)
def test_error_falls_with_the_order(name, dimensions):
    order, options = ORDERS[name]
    counts = LATER if name == "unipc-3" else COUNTS  # it approaches its slope from below
    found = errors(name, counts, dimensions=dimensions, **options)
    assert slope(counts, found) == pytest.approx(order, abs=MARGIN), found


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *(pytest.param("flow", kind, id=f"flow, {kind}") for kind in process.KINDS),
        *(pytest.param("linear", kind, id=f"linear, {kind}") for kind in process.KINDS[1:]),
    ],
)
@pytest.mark.parametrize("name", ["heun", "unipc-2"])
def test_error_falls_likewise_for_other_predictions(name, path, kind):
    order, options = ORDERS[name]
    found = errors(name, COUNTS, path=path, kind=kind, **options)
    assert slope(COUNTS, found) == pytest.approx(order, abs=MARGIN), found


@pytest.mark.parametrize("name", ["dpm-2", "dpm-3", "dpmpp-2m", "dpmpp-2s", "dpmpp-2m-sde"])
def test_heuns_form_has_the_same_order(name):
    order, options = ORDERS[name]
    found = errors(name, COUNTS, solver_type="heun", **options)
    assert slope(COUNTS, found) == pytest.approx(order, abs=MARGIN), found


@pytest.mark.parametrize("alpha", [0.5, 2 / 3])
@pytest.mark.parametrize("path", PATHS)
def test_two_stages_have_second_order_wherever_the_second_lies(path, alpha):
    found = errors("heun", COUNTS, path=path, alpha=alpha)
    assert slope(COUNTS, found) == pytest.approx(2, abs=MARGIN), found


def test_diffusers_form_of_dpm_3_has_third_order_with_a_larger_error():
    theirs = errors("dpm-3", COUNTS, solver_type="diffusers", **FULL)
    assert slope(COUNTS, theirs) == pytest.approx(3, abs=MARGIN), theirs
    ours = errors("dpm-3", COUNTS, **FULL)
    assert all(1.5 * a < b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("dimensions", DATA, ids="{}-d".format)
def test_a_group_of_dpm_3_is_algorithm_2_of_the_paper(dimensions):
    """arXiv:2206.00927, algorithm 2, with r_1 = 1/3 and r_2 = 2/3, in float64."""
    mixture, x, _ = problem(dimensions, "linear")
    sampler = samplers.make("dpm-3", PATHS["linear"], 3, **BETWEEN, **FULL)
    s, s1, s2, t = sampler.points
    assert [point.lam - s.lam for point in (s1, s2, t)] == pytest.approx(
        [(t.lam - s.lam) * share for share in (1 / 3, 2 / 3, 1)]
    )
    model, h, r1, r2 = mixture.model(PATHS["linear"], "eps"), t.lam - s.lam, 1 / 3, 2 / 3
    at_s = model(x, s.t)
    u1 = s1.alpha / s.alpha * x - s1.sigma * math.expm1(r1 * h) * at_s
    d1 = model(u1, s1.t) - at_s
    u2 = s2.alpha / s.alpha * x - s2.sigma * math.expm1(r2 * h) * at_s
    u2 = u2 - s2.sigma * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
    d2 = model(u2, s2.t) - at_s
    end = t.alpha / s.alpha * x - t.sigma * math.expm1(h) * at_s
    end = end - t.sigma / r2 * (math.expm1(h) / h - 1) * d2
    path = run_table(sampler.table, x, model=model)
    for found, wanted in zip(path[1:], (u1, u2, end), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dimensions", DATA, ids="{}-d".format)
@pytest.mark.parametrize("short", [1, 2, 3], ids="3 S - {}".format)
def test_dpm_fast_has_third_order_up_to_its_last_steps(short, dimensions):
    """Ending with an evaluation less costs an error of third order, with two an error of second,
    in a single step."""
    counts = (24, 36, 54)
    found = [
        errors("dpm-fast", [s], dimensions=dimensions, evaluations=3 * s - short)[0] for s in counts
    ]
    order = slope(counts, found)
    assert (order > 2 - MARGIN) if short > 1 else (order == pytest.approx(3, abs=MARGIN)), found


def test_dpm_fast_is_made_of_the_papers_steps():
    """On a grid of the same points, DPM-Solver-3 with the paper's last steps."""
    path, steps = PATHS["linear"], 6
    for short, orders in ((3, [3, 3, 3, 3, 2, 1]), (2, [3] * 5 + [1]), (1, [3] * 5 + [2])):
        fast = samplers.make("dpm-fast", path, steps, evaluations=3 * steps - short, **BETWEEN)
        assert fast.table.evaluations == tuple(orders)
        lams = [-math.log(HIGH) + i / steps * math.log(HIGH / LOW) for i in range(steps)]
        h = math.log(HIGH / LOW) / steps
        wanted = [lam + h * j / k for lam, k in zip(lams, orders, strict=True) for j in range(k)]
        found = [math.log(a / s) for a, s in fast.table.levels[:-1].tolist()]
        assert found == pytest.approx(wanted, abs=1e-9)
        grid = {**BETWEEN, "grid": [point_at_ratio(path, math.exp(-lam)).t for lam in wanted]}
        plain = samplers.make("dpm-3", path, sum(orders), **grid).table
        torch.testing.assert_close(fast.table.values, plain.values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "plain"), [("kdpm-2", "dpm-2"), ("dpmpp-2s-ancestral", "dpmpp-2s")]
)
def test_steps_with_their_own_middle_are_singlestep_ones_on_a_finer_grid(name, plain):
    """The middle in log(sigma / alpha), which an even grid of twice the points has."""
    options = {} if name == "kdpm-2" else NO_NOISE
    mixture, x, _ = problem(2, "linear")
    own = samplers.make(name, PATHS["linear"], 10, **BETWEEN, **options).table
    finer = samplers.make(plain, PATHS["linear"], 20, **BETWEEN, **FULL).table
    runs = [run_table(table, x, model=mixture.model(PATHS["linear"])) for table in (own, finer)]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-9)


def test_3m_sde_without_noise_is_3m():
    path = PATHS["linear"]
    tables = [
        samplers.make(name, path, 9, **BETWEEN, **FULL, **options).table
        for name, options in (("dpmpp-3m-sde", NO_NOISE), ("dpmpp-3m", {"solver_type": "heun"}))
    ]
    torch.testing.assert_close(tables[0].values, tables[1].values, rtol=1e-12, atol=1e-12)


def test_k_diffusions_form_of_3m_sde_has_second_order():
    """It takes the second difference once where a parabola needs it twice."""
    mixture, x, wanted = problem(2, "linear")
    found = []
    for count in LATER:
        sampler = samplers.make(
            "dpmpp-3m-sde", PATHS["linear"], count, solver_type="k-diffusion",
            **BETWEEN, **NO_NOISE, **FULL,
        )  # fmt: skip
        end = run_after_the_truth(sampler, 2, mixture, PATHS["linear"], x)
        found.append(distance(end, wanted))
    assert slope(LATER, found) == pytest.approx(2, abs=MARGIN), found


@pytest.mark.parametrize("r", [0.35, 0.5, 0.7], ids="r={}".format)
def test_dpmpp_sde_has_second_order_wherever_it_looks(r):
    found = errors("dpmpp-sde", COUNTS, r=r, **NO_NOISE)
    assert slope(COUNTS, found) == pytest.approx(2, abs=MARGIN), found


def uneven(spacing, steps):
    """Options of a grid that goes from HIGH to LOW, the step to LOW being one like the others.

    karras and ratio are smooth: neighbouring steps become alike as S grows. Those of rough, in log
    sigma / alpha, alternate between one length and twice that.
    """
    path, shares = PATHS["linear"], [i / steps for i in range(steps)]
    if spacing == "rough":
        rough = [share - (i % 2) / (3 * steps) for i, share in enumerate(shares)]
        times = [point_at_ratio(path, HIGH * (LOW / HIGH) ** share).t for share in rough]
    elif spacing == "ratio":
        times = [point_at_ratio(path, HIGH + share * (LOW - HIGH)).t for share in shares]
    else:  # arXiv:2206.00364, eq. 5, with rho = 7
        a, b = HIGH ** (1 / 7), LOW ** (1 / 7)
        times = [point_at_ratio(path, (a + share * (b - a)) ** 7).t for share in shares]
    return {"grid": times, "final": "sigma_min", "sigma_min": LOW}


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        pytest.param(name, spacing, id=f"{name}, {spacing}")
        for name in ORDERS
        for spacing in ("karras", "rough")
        # DPM-Solver-3's order rests on r_2 = 2/3, which only a smooth grid tends to.
        if name not in ("plms", "unipc-3") and (name, spacing) != ("dpm-3", "rough")
    ],
)
def test_order_does_not_need_even_steps(name, spacing):
    order, options = ORDERS[name]
    found = [errors(name, [s], **uneven(spacing, s), **options)[0] for s in LATER]
    assert slope(LATER, found) == pytest.approx(order, abs=MARGIN), found


def run_after_the_truth(sampler, steps, mixture, path, x):
    """The end of a run whose first steps are replaced by the true solution, and their history by
    the model's values along it."""
    table, model, history = sampler.table, mixture.model(path), {}
    skip = table.steps.tolist().index(steps)
    points = [
        Point(t, alpha, sigma)
        for t, (alpha, sigma) in zip(table.timesteps.tolist(), table.levels.tolist(), strict=False)
    ]
    for r, (here, there) in enumerate(pairwise(points[: skip + 1])):
        row = dict(zip(COLUMNS, table.values[r].tolist(), strict=False))
        m = model(x, here.t)
        x0 = row["x0_x"] * x + row["x0_m"] * m
        if row["slot"] >= 0:
            kept = row["keep_x"] * x + row["keep_x0"] * x0 + row["keep_m"] * m
            history[int(row["slot"])] = kept
        if there != here:
            x = mixture.solve(x, here, there)
    later = replace(
        table,
        values=table.values[skip:],
        timesteps=table.timesteps[skip:],
        steps=table.steps[skip:] - steps,
        levels=table.levels[skip:],
    )
    return run_table(later, x, model=model, history=history)[-1]


@pytest.mark.parametrize(
    ("dimensions", "spacing"),
    [
        pytest.param(1, "logsnr", id="1-d, even"),
        pytest.param(2, "logsnr", id="2-d, even"),
        pytest.param(2, "rough", id="2-d, uneven"),
    ],
)
@pytest.mark.parametrize("case", STARTED)
def test_error_falls_with_the_order_after_a_true_start(case, dimensions, spacing):
    name, steps, order, options = STARTED[case]
    mixture, x, wanted = problem(dimensions, "linear")
    found = []
    for count in LATER:
        grid = BETWEEN if spacing == "logsnr" else uneven(spacing, count)
        sampler = samplers.make(name, PATHS["linear"], count, **grid, **options)
        end = run_after_the_truth(sampler, steps, mixture, PATHS["linear"], x)
        found.append(distance(end, wanted))
    assert slope(LATER, found) == pytest.approx(order, abs=MARGIN), found


@pytest.mark.parametrize("dimensions", DATA, ids="{}-d".format)
@pytest.mark.parametrize(
    ("name", "options"), [("dpmpp-3m", FULL), ("deis-3", FULL), ("lms", {})], ids=str
)
def test_a_whole_run_has_at_least_second_order(name, options, dimensions):
    """One step of first order has an error of second order, and so has the run."""
    found = errors(name, COUNTS, dimensions=dimensions, **options)
    assert slope(COUNTS, found) > 2 - MARGIN, found


def test_plms_has_fourth_order_for_even_steps():
    """Adams and Bashforth's weights are those of even steps: here in sigma / alpha, of which
    DDIM's transfer is a straight step. Its start of two evaluations costs too little to see."""
    counts = (400, 600, 900)
    found = [errors("plms", [s], dimensions=2, **uneven("ratio", s))[0] for s in counts]
    assert slope(counts, found) == pytest.approx(4, abs=MARGIN), found


def test_there_and_back_again():
    """DDIM's inversion, then DDIM: the image comes back, with an error that falls as 1 / S."""
    path, (mixture, noise, image) = PATHS["linear"], problem(2, "linear")
    model, found, between = mixture.model(path), [], []
    for steps in COUNTS:
        there = samplers.make("ddim-inverse", path, steps, **BETWEEN).table
        back = samplers.make("ddim", path, steps, clip=None, **BETWEEN).table
        encoded = run_table(there, image, model=model)[-1]
        between.append(distance(encoded, noise))
        found.append(distance(run_table(back, encoded, model=model)[-1], image))
    assert found[-1] < 0.02
    assert slope(COUNTS, found) == pytest.approx(1, abs=MARGIN), found
    assert slope(COUNTS, between) == pytest.approx(1, abs=MARGIN), between


def test_inversion_begins_at_the_image_itself():
    """With final = zero the levels are DDIM's in reverse order, from alpha = 1 and sigma = 0."""
    path = PATHS["linear"]
    there = samplers.make("ddim-inverse", path, 20).table
    back = samplers.make("ddim", path, 20).table
    assert there.levels[0].tolist() == [1.0, 0.0]
    torch.testing.assert_close(there.levels, back.levels.flip(0), rtol=0, atol=0)
    # The model is given the time of the level that a step leads to.
    torch.testing.assert_close(there.timesteps, back.timesteps.flip(0), rtol=0, atol=0)
