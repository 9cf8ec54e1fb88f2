"""Every sampler of the registry at the ends of its range: few and many steps, levels without signal
or without noise, thresholds, late starts, every dtype and layout, and nothing but a table."""

from __future__ import annotations

import ast
import inspect
import math

import pytest
import torch
from closed_forms import three_clouds
from sampler_runs import run_table

from fastdiff import ops, sample, samplers, schedules
from fastdiff.samplers import COLUMNS, Sampler, Table
from fastdiff.samplers.grids import point_at_time

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:fastdiff. .* never reaches noise",
        "ignore:fastdiff. the . steps of .* begin at abar",
    ),
]

T = 20
LINEAR, COSINE, FLOW = schedules.linear(T), schedules.cosine(T), schedules.flow(T)
ZERO_SNR = schedules.rescale_zero_terminal_snr(COSINE)
NAMES = samplers.names()
LEAST = {
    name: int(name.split("-")[1][0]) for name in NAMES if name[-2:] in ("-2", "-3", "2m", "3m")
}
LEAST |= {"dpmpp-2s": 2, "dpmpp-2m-sde": 2, "dpmpp-3m-sde": 3, "kdpm-2": 1}
OPTIONS = {"lcm": {"original_steps": 10}}
# Methods in sigma / alpha, which cannot begin where there is no signal.
NEEDS_SIGNAL = {
    "plms", "heun", "kdpm-2", "dpm-1", "dpm-2", "dpm-3", "dpm-2-ancestral", "dpm-fast",
    "dpmpp-2s-ancestral", "dpmpp-sde", "deis-2", "deis-3", "lms",
}  # fmt: skip
# Methods whose steps know nothing of the steps before them.
ONE_STEP = {
    "ddpm", "ddim", "ddim-inverse", "euler", "euler-ancestral", "heun", "kdpm-2", "dpm-1",
    "dpm-2-ancestral", "dpm-fast", "dpmpp-1s", "dpmpp-2s-ancestral", "dpmpp-sde", "lcm",
    "consistency",
}  # fmt: skip


def make(name, path, steps, **options):
    return samplers.make(name, path, steps, **OPTIONS.get(name, {}), **options)


def noises_for(table, x):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(table.rows, *x.shape, generator=generator, dtype=torch.float64)


def images(shape=(2, 3, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def assert_sound(table):
    """All numbers are finite but the limits of clip."""
    values = table.values.clone()
    for limit in ("clip_min", "clip_max"):
        values[:, COLUMNS.index(limit)] = 0
    assert bool(values.isfinite().all()), table
    assert bool(table.timesteps.isfinite().all())
    assert bool(table.levels.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_the_fewest_steps(name):
    least = LEAST.get(name, 1)
    for path, prediction in ((LINEAR, "eps"), (COSINE, "v")):
        sampler = make(name, path, least, prediction=prediction)
        assert sampler.steps == sampler.table.num_steps == least
        assert_sound(sampler.table)
        x = images()
        end = run_table(sampler.table, x, noises_for(sampler.table, x))[-1]
        assert bool(end.isfinite().all())
    if least > 1:
        with pytest.raises(ValueError, match=f"{name} needs at least {least} steps, got 1"):
            make(name, LINEAR, 1)


@pytest.mark.parametrize(
    "name", sorted({name for name in NAMES if LEAST.get(name, 1) == 1} - {"ddim-inverse"})
)
def test_one_step_returns_the_predicted_image(name):
    """From any level a single step to zero noise is x0, whatever the method."""
    kind = {"prediction": "x0"}
    options = {"timestep_scaling": 1e9} if name == "lcm" else {}  # so that c_out is 1
    table = make(name, LINEAR, 1, **kind, **options, clip=None).table
    x0 = images()
    end = run_table(table, images(), noises_for(table, x0), model=lambda x, t: x0)[-1]
    torch.testing.assert_close(end, x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", ["leading", "trailing", "linspace", "quadratic"])
@pytest.mark.parametrize("name", NAMES)
def test_as_many_steps_as_timesteps(name, grid):
    table = make(name, LINEAR, T, grid=grid).table
    assert table.num_steps == T
    assert_sound(table)
    visited = table.timesteps[table.steps.diff(append=torch.tensor([T])) > 0]  # a step's last row
    if name in ("ddim", "ddpm", "euler", "dpmpp-2m", "unipc-3", "lms"):
        assert visited.tolist() == list(range(T))[::-1]
    x = images()
    assert bool(run_table(table, x, noises_for(table, x))[-1].isfinite().all())
    with pytest.raises(ValueError, match=rf"in 1\.\.{T} .*got {T + 1}"):
        make(name, LINEAR, T + 1, grid=grid)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_element(name):
    table = make(name, LINEAR, 5).table
    x = images((1, 1))
    assert run_table(table, x, noises_for(table, x))[-1].shape == (1, 1)
    found = sample(lambda x, t: x / 2, make(name, LINEAR, 5), (1, 1), seed=0, progress=False)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        pytest.param(ZERO_SNR, "v", id="zero SNR, v"),
        pytest.param(ZERO_SNR, "x0", id="zero SNR, x0"),
        pytest.param(ZERO_SNR, "flow", id="zero SNR, flow"),
        pytest.param(FLOW, "flow", id="flow schedule, flow"),
        pytest.param(FLOW, "x0", id="flow schedule, x0"),
        pytest.param(schedules.flow(T, shift=3.0), "v", id="shifted flow schedule, v"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_no_signal_at_the_first_step(name, path, kind):
    """Methods that can begin at x_T = eps do, and the others say why not."""
    for steps in (3, 4, 7):
        if name in NEEDS_SIGNAL:
            with pytest.raises(ValueError, match="infinite at"):
                make(name, path, steps, grid="trailing", prediction=kind)
            later = make(name, path, steps, grid=[15.5 - i for i in range(steps)], prediction=kind)
            assert_sound(later.table)
            continue
        sampler = make(name, path, steps, grid="trailing", prediction=kind)
        assert_sound(sampler.table)
        x = images((4, 2))
        data = three_clouds(2)
        noises = noises_for(sampler.table, x)
        end = run_table(sampler.table, x, noises, model=data.model(path, kind))[-1]
        assert bool(end.isfinite().all())
        if name != "ddim-inverse":
            assert sampler.table.levels[0].tolist() == [0.0, 1.0]
            # Nothing of x is in the first x0: all of the images have the data's mean.
            row = dict(zip(COLUMNS, sampler.table.values[0].tolist(), strict=False))
            first = row["x0_x"] * x + row["x0_m"] * data.predict(x, 0.0, 1.0, kind)
            torch.testing.assert_close(first, data.mean().expand_as(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["eps", "score"])
@pytest.mark.parametrize("name", NAMES)
def test_eps_is_refused_without_signal(name, kind):
    for path in (ZERO_SNR, FLOW):
        with pytest.raises(ValueError, match=f"zero signal at t = 19, .* of {kind} says nothing"):
            make(name, path, 4, grid="trailing", prediction=kind)
        assert_sound(make(name, path, 4, grid=[18, 11.5, 7, 2], prediction=kind).table)


@pytest.mark.parametrize(
    "thresholds",
    [
        pytest.param({"clip": (-0.5, 0.8)}, id="clip"),
        pytest.param({"dynamic_threshold": 0.9}, id="dynamic"),
        pytest.param({"dynamic_threshold": 1.0, "clip": (-1.0, 1.5)}, id="dynamic, limited"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_thresholds_hold_for_every_sampler(name, thresholds):
    """The limits are in the table, and what is far outside them does not blow up a run."""
    table = make(name, LINEAR, 6, **thresholds).table
    low, high = thresholds.get("clip", (-math.inf, math.inf))
    assert table.column("clip_min").tolist() == [low] * table.rows
    assert table.column("clip_max").tolist() == [high] * table.rows
    assert (
        table.column("quantile").tolist() == [thresholds.get("dynamic_threshold", 0)] * table.rows
    )
    x = 10 * images()
    run = run_table(table, x, model=lambda x, t: torch.zeros_like(x))  # eps = 0: x0 = x / alpha
    if name == "ddim-inverse":
        assert bool(run.isfinite().all())
        return
    bound = 2 * max(abs(low), abs(high), 1.0) if "clip" in thresholds else 4.0
    assert run[-1].abs().max() < bound


@pytest.mark.parametrize(
    ("options", "predicted", "meant"),
    [
        pytest.param({"clip": (-1.0, 1.0)}, 5.0, 1.0, id="clip"),
        pytest.param({"clip": (-0.5, 1.0)}, -5.0, -0.5, id="clip below"),
        pytest.param({"dynamic_threshold": 0.9}, 5.0, 1.0, id="dynamic"),
        pytest.param(
            {"dynamic_threshold": 0.9, "clip": (-1, 2)}, -5.0, -1.0, id="dynamic, limited"
        ),
    ],
)
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_is_as_if_the_model_had_predicted_so(name, kind, options, predicted, meant):
    """Its eps, too, is that of the image after thresholding."""

    def model_of(x0):
        def model(x, t):
            s = point_at_time(LINEAR, t)
            eps = (x - s.alpha * x0) / s.sigma
            return eps if kind == "eps" else s.alpha * eps - s.sigma * x0

        return model

    x = images()
    table = make(name, LINEAR, 6, prediction=kind, **options).table
    plain = make(name, LINEAR, 6, prediction=kind, clip=None).table
    noises = noises_for(table, x)
    found = run_table(table, x, noises, model_of(predicted))
    torch.testing.assert_close(found, run_table(plain, x, noises, model_of(meant)))


@pytest.mark.parametrize("name", NAMES)
def test_starting_later(name):
    """starting_at(k) takes the last S - k steps; of one-step methods these are the whole run's."""
    options = {"s_churn": 3.0} if name in ("euler", "heun", "kdpm-2") else {}
    sampler = make(name, LINEAR, 8, **options)
    whole = sampler.table
    for k in range(8):
        later = sampler.starting_at(k)
        assert later.steps == later.table.num_steps == 8 - k
        assert later.table.steps[0] == 0
        assert_sound(later.table)
        torch.testing.assert_close(later.table.levels[0], whole.levels[:-1][whole.steps == k][0])
        torch.testing.assert_close(later.table.levels[-1], whole.levels[-1], rtol=0, atol=0)
        if name in ONE_STEP:
            rows = later.table.rows
            values, tail = later.table.values.clone(), whole.values[-rows:].clone()
            for table in (values, tail):  # the variance of no noise says nothing
                silent = table[:, COLUMNS.index("noise")] == 0
                table[silent, COLUMNS.index("logvar")] = 0
            width = values.shape[1]  # a last step alone may need no history
            torch.testing.assert_close(values, tail[:, :width], rtol=0, atol=0)
            assert not tail[:, width:].any()
            torch.testing.assert_close(later.timesteps, whole.timesteps[-rows:], rtol=0, atol=0)
    assert sampler.table is whole
    assert sampler.steps == 8


@pytest.mark.parametrize(
    "name", ["dpmpp-2m", "dpmpp-3m", "deis-2", "deis-3", "dpmpp-2m-sde", "dpmpp-3m-sde"]
)
def test_starting_later_does_not_lower_the_order(name):
    """Of 20 steps the last ten are no run of few, large steps: lower_order_final stays off."""
    sampler = make(name, LINEAR, 20, grid="logsnr", final="sigma_min")
    later = sampler.starting_at(10).table
    torch.testing.assert_close(later.values[-3:, 7:], sampler.table.values[-3:, 7:])
    assert later.values[-1, len(COLUMNS) :].any()
    few = make(name, LINEAR, 10, grid="logsnr", final="sigma_min").table
    assert not few.values[-1, len(COLUMNS) :].any()


DTYPES = {
    "float64": (torch.float64, 1e-12),
    "float32": (torch.float32, 2e-5),
    "bfloat16": (torch.bfloat16, 0.03),
    "float16": (torch.float16, 4e-3),
}
LAYOUTS = {
    "NCHW": lambda x: x,
    "NHWC": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "cut out": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_and_layout(name, dtype, layout):
    """Through the operation that real runs use, in place, against plain code in float64.

    Each step may round x once: S roundings, and the model passes them on.
    """
    dtype, tolerance = DTYPES[dtype]
    table = make(name, LINEAR, 4, prediction="x0", clip=(-1.0, 1.0)).table
    x = LAYOUTS[layout](images((2, 3, 5, 5)).to(dtype))
    noises = noises_for(table, x).to(dtype)

    def model(x, t):
        return torch.sin(x + 0.1 * t) / 2

    wanted = run_table(table, x.double(), noises.double(), model)[-1]
    wide = torch.promote_types(dtype, torch.float32)
    values, strides = table.values.to(wide), x.stride()
    history = ops.new_history(x, table.depth) if table.depth else None
    for row, t in enumerate(table.timesteps.tolist()):
        noise = LAYOUTS[layout](noises[row]) if layout != "transposed" else noises[row]
        out = model(x.double(), t).to(dtype)
        step = torch.tensor(row)
        assert ops.sampler_step(x, out, history, noise, values, step, out=x) is x
    assert x.dtype == dtype
    assert x.stride() == strides
    error = (x.double() - wanted).norm() / wanted.norm()
    assert error < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_a_table_from_json_is_all_there_is(name):
    """The one loop runs the numbers alone: no sampler object, the same images to the bit."""
    sampler = make(name, LINEAR, 6)
    table = Table.from_json(sampler.table.to_json())

    def model(x, t):
        return torch.sin(x + 0.1 * t.view(-1, 1, 1, 1))

    runs = [
        sample(model, steps, (2, 3, 4, 4), seed=5, progress=False, return_trajectory=True)
        for steps in (sampler, table)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("name", NAMES)
def test_no_sampler_has_a_loop_or_a_kernel(name):
    """A sampler's classes say what a row is and which points are visited. They handle no images:
    their modules do not even import torch, nor the operations, nor the loop."""
    sampler = make(name, LINEAR, 6)
    assert isinstance(sampler, Sampler)
    assert isinstance(sampler.table, Table)
    own = [cls for cls in type(sampler).__mro__ if issubclass(cls, Sampler) and cls is not Sampler]
    assert any("rows" in vars(cls) for cls in own)
    for cls in own:
        functions = {key for key, value in vars(cls).items() if inspect.isfunction(value)}
        public = {key for key in functions if not key.startswith("_")}
        special = {key for key in functions if key.startswith("__")}
        assert public <= {"rows", "churned"}
        assert special <= {"__init__"}
        module = inspect.getmodule(cls)
        imported = set()
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        outside = {each for each in imported if not each.startswith("fastdiff.samplers.")}
        assert outside <= {
            "__future__", "collections.abc", "dataclasses", "fastdiff.schedules", "math", "numpy",
            "typing",
        }  # fmt: skip


def test_no_samplers_row_depends_on_images():
    """Making a sampler needs no images: a table is the same whatever it is used on, and again."""
    for name in NAMES:
        first, second = (make(name, LINEAR, 6).table for _ in range(2))
        assert torch.equal(first.values, second.values)
        assert torch.equal(first.timesteps, second.timesteps)
