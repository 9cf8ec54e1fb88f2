"""The coefficient table: what a row means, its memory, its text, and the registry of samplers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from sampler_runs import fake_model, run_table

from fastdiff import ops, samplers, schedules
from fastdiff.samplers import COLUMNS, DDIM, DDPM, Sampler, Table
from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import EPS, X0, Keep, Row
from fastdiff.samplers.table import MAX_HISTORY

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = schedules.linear(100)
ZERO_SNR = schedules.rescale_zero_terminal_snr(SCHEDULE)


def table(rows=2, depth=0, **columns):
    """A table of zeros but for what is given."""
    values = torch.zeros(rows, len(COLUMNS) + depth, dtype=torch.float64)
    defaults = {"guidance": 1.0, "clip_min": -math.inf, "clip_max": math.inf, "slot": -1.0}
    names = [*COLUMNS, *(f"h_{j}" for j in range(depth))]
    for name, value in {**defaults, **columns}.items():
        values[:, names.index(name)] = torch.as_tensor(value, dtype=torch.float64)
    return Table(
        "made",
        values,
        torch.arange(rows, dtype=torch.float64).flip(0),
        torch.arange(rows),
        torch.ones(rows + 1, 2, dtype=torch.float64),
    )


def test_every_language_has_the_columns_of_python_in_their_order():
    header = (ROOT / "csrc" / "sampler_table.h").read_text(encoding="utf-8")
    (enumeration,) = re.findall(r"enum SamplerColumn \{([^}]*)\}", header)
    camel = ["k" + name.title().replace("_", "") for name in COLUMNS]
    assert re.findall(r"\w+", enumeration) == [*camel, "kSamplerColumns"]
    assert re.findall(r"kSamplerDepth = (\d+);", header) == [str(MAX_HISTORY)]

    triton = (ROOT / "kernels" / "sampler_step.py").read_text(encoding="utf-8")
    constants = dict(re.findall(r"^(\w+) = tl\.constexpr\((\d+)\)$", triton, re.MULTILINE))
    wanted = {name.upper(): str(index) for index, name in enumerate(COLUMNS)}
    assert constants == {"COLUMNS": str(len(COLUMNS)), **wanted}


def test_a_row_means_what_the_docstring_says():
    x, m, v, z, kept = 0.3, -0.8, 0.4, 1.7, 2.5
    row = {
        "x0_x": 0.9, "x0_m": -0.7, "clip_min": -0.5, "clip_max": 0.5,
        "out_x": 0.2, "out_x0": 1.1, "out_m": 0.3, "noise": 0.6, "logvar": -1.2, "logvar_v": 0.8,
        "keep_x": 0.5, "keep_x0": 0.25, "keep_m": -2.0, "keep_noise": 0.125, "slot": 1.0,
        "h_0": 0.75,
    }  # fmt: skip
    x0 = min(max(row["x0_x"] * x + row["x0_m"] * m, row["clip_min"]), row["clip_max"])
    assert x0 == row["clip_max"]
    deviation = row["noise"] * math.exp((row["logvar"] + row["logvar_v"] * v) / 2)
    wanted = row["out_x"] * x + row["out_x0"] * x0 + row["out_m"] * m + deviation * z
    wanted += row["h_0"] * kept
    made = table(2, 2, **row)

    def pixel(*channels):
        return torch.tensor(channels, dtype=torch.float64).view(1, -1, 1, 1)

    history = torch.stack([pixel(kept), pixel(math.nan)])
    got = ops.sampler_step(pixel(x), pixel(m, v), history, pixel(z), made.values, torch.tensor(1))
    assert got.item() == pytest.approx(wanted, rel=1e-14)
    assert history[0].item() == kept
    wanted = row["keep_x"] * x + row["keep_x0"] * x0 + row["keep_m"] * m + row["keep_noise"] * z
    assert history[1].item() == pytest.approx(wanted, rel=1e-14)
    # The plain-code run of the sampler tests says the same.
    learned = dataclasses.replace(made, learned_variance=True)
    path = run_table(
        learned, pixel(x), [pixel(z)] * 2, lambda *_: pixel(m, v), history={0: pixel(kept)}
    )
    assert path[1].item() == got.item()


def test_properties():
    heun = samplers.make("heun", SCHEDULE, 3).table
    assert (heun.rows, heun.num_steps, heun.evaluations, heun.depth) == (5, 3, (2, 2, 1), 1)
    assert heun.steps.tolist() == [0, 0, 1, 1, 2]
    assert heun.timesteps.dtype == heun.values.dtype == heun.levels.dtype == torch.float64
    assert heun.levels.shape == (6, 2)
    assert heun.levels[-1].tolist() == [1.0, 0.0]
    assert not heun.needs_noise
    ddpm = DDPM(SCHEDULE, 3).table
    assert ddpm.noisy == [True, True, False]
    assert ddpm.needs_noise
    assert ddpm.depth == 0
    kept = table(2, 1, slot=[0.0, -1.0], keep_noise=[1.0, 0.0])
    assert kept.noisy == [True, False]


LIVE = {  # how many values have to be kept at a time
    "ddpm": 0, "ddim": 0, "ddim-inverse": 0, "plms": 3, "euler": 0, "euler-ancestral": 0,
    "heun": 1, "kdpm-2": 1, "dpm-1": 0, "dpm-2": 1, "dpm-3": 2, "dpm-2-ancestral": 1, "dpm-fast": 2,
    "dpmpp-1s": 0, "dpmpp-2s": 1, "dpmpp-2s-ancestral": 1, "dpmpp-2m": 1, "dpmpp-3m": 2,
    "dpmpp-sde": 1, "dpmpp-2m-sde": 1, "dpmpp-3m-sde": 2, "unipc-1": 1, "unipc-2": 2, "unipc-3": 3,
    "deis-2": 1, "deis-3": 2, "lms": 3, "lcm": 0, "consistency": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", samplers.names())
def test_memory_is_the_least_possible(name):
    made = samplers.make(name, SCHEDULE, 20).table
    assert made.depth == LIVE[name]


@pytest.mark.parametrize("name", samplers.names())
def test_values_live_as_long_as_they_are_read(name):
    """Slots are written before they are read, none for nothing, and all of them are used."""
    made = samplers.make(name, SCHEDULE, 20).table
    unread: set[int] = set()
    written: set[int] = set()
    for row in made.values.tolist():
        read = {j for j, value in enumerate(row[len(COLUMNS) :]) if value != 0}
        assert read <= written
        unread -= read
        slot = int(row[COLUMNS.index("slot")])
        if slot >= 0:
            assert slot not in unread, "overwritten before it was read"
            unread.add(slot)
            written.add(slot)
        else:
            assert row[COLUMNS.index("keep_x") : COLUMNS.index("slot")] == [0.0] * 4
    assert not unread
    assert written == set(range(made.depth))


class Made(Sampler):
    """A sampler of given rows."""

    name = "made"

    def __init__(self, *rows):
        self.given = rows
        super().__init__(SCHEDULE, len(rows), grid="trailing")

    def rows(self, points):
        return self.given


AT = Point(50.0, 0.6, 0.8)


def test_slots_are_used_again():
    rows = [
        Row(0, AT, x=1.0, keep=X0),
        Row(1, AT, x=1.0, keep=EPS),
        Row(2, AT, x=1.0, history=(0.5, 0.25), keep=X0),  # the last to read the first two
        Row(3, AT, x=1.0, history=(0.0, 0.0, 0.0), keep=Keep(x=1.0)),  # reads nothing
        Row(4, AT, x=1.0, history=(0.0, 2.0)),
    ]
    made = Made(*rows).table
    assert made.depth == 2
    assert made.column("slot").tolist() == [0, 1, 0, -1, -1]  # nobody reads what row 3 offers
    history = made.values[:, len(COLUMNS) :].tolist()
    assert history == [[0, 0], [0, 0], [0.25, 0.5], [0, 0], [2.0, 0]]


def test_too_long_a_memory():
    rows = [Row(i, AT, x=1.0, keep=X0) for i in range(MAX_HISTORY + 1)]
    rows.append(Row(MAX_HISTORY + 1, AT, x=1.0, history=[1.0] * (MAX_HISTORY + 1)))
    with pytest.raises(ValueError, match=f"at most {MAX_HISTORY} is possible, got 9"):
        Made(*rows)


@pytest.mark.parametrize("name", samplers.names())
def test_json_keeps_every_bit(name, x_T, noises):
    options = {"variance": "learned_range"} if name == "ddpm" else {"clip": (-1.0, 1.0)}
    made = samplers.make(name, SCHEDULE, 7, **options).table
    again = Table.from_json(made.to_json())
    for field in dataclasses.fields(Table):
        a, b = getattr(made, field.name), getattr(again, field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b
    if not made.learned_variance:
        assert torch.equal(
            run_table(made, x_T, noises, fake_model), run_table(again, x_T, noises, fake_model)
        )


def test_infinities_in_json(tmp_path):
    made = DDIM(SCHEDULE, 3, clip=None).table
    fields = json.loads(made.to_json(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert fields["values"][0][COLUMNS.index("clip_min")] == "-inf"
    assert fields["values"][0][COLUMNS.index("clip_max")] == "inf"
    made.save(tmp_path / "table.json")
    again = Table.load(str(tmp_path / "table.json"))
    assert torch.equal(again.values, made.values)
    assert str(again) == str(made)


def damaged(**changes):
    fields = json.loads(samplers.make("heun", SCHEDULE, 3).table.to_json())
    for key, value in changes.items():
        if value is None:
            del fields[key]
        else:
            fields[key] = value
    return json.dumps(fields)


VALUES = samplers.make("heun", SCHEDULE, 3).table.values.nan_to_num(posinf=1, neginf=-1).tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "Expecting value", id="nothing"),
        pytest.param("{", "Expecting property name", id="half"),
        pytest.param("[1, 2]", "not a sampler table", id="list"),
        pytest.param('{"values": []}', "not a sampler table", id="foreign"),
        pytest.param(damaged(format="other"), "not a sampler table", id="other format"),
        *(
            pytest.param(damaged(**{key: None}), f"damaged.*{key}", id=f"without {key}")
            for key in ("name", "learned_variance", "columns", "steps", "timesteps", "levels")
        ),
        pytest.param(damaged(values=None), "damaged.*values", id="without values"),
        pytest.param(damaged(values=5), "damaged", id="values of a number"),
        pytest.param(damaged(values=[[None] * 19] * 5), "damaged", id="values of null"),
        pytest.param(damaged(values=[["x"] * 19] * 5), "could not convert", id="values of words"),
        pytest.param(damaged(values=[*VALUES[:-1], [1.0]]), "length 19", id="ragged"),
        pytest.param(damaged(values=VALUES[:-1]), r"timesteps must have shape \(4,\)", id="short"),
        pytest.param(damaged(values=[]), "R >= 1", id="empty"),
        pytest.param(damaged(steps=[0, 1]), r"steps must have shape \(5,\)", id="short steps"),
        pytest.param(damaged(steps=[0, 0, 2, 2, 3]), "rise by 1", id="jumping steps"),
        pytest.param(damaged(levels=[[1, 0]]), r"levels must have shape \(6, 2\)", id="levels"),
        pytest.param(damaged(columns=["guidance"]), "columns must be guidance", id="columns"),
        pytest.param(damaged(columns=[*COLUMNS, "h_1"]), "columns must be", id="history columns"),
    ],
)
def test_damaged_json(text, message):
    with pytest.raises(ValueError, match=message):
        Table.from_json(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: table(2, 1, slot=[0.0, 1.0]), "from -1 to 0", id="slot beyond"),
        pytest.param(lambda: table(2, 0, slot=0.0), "from -1 to -1", id="slot without history"),
        pytest.param(lambda: table(2, 1, slot=-2.0), "from -1 to 0", id="slot below"),
        pytest.param(lambda: table(2, 2, slot=0.5), "whole number", id="half a slot"),
        pytest.param(lambda: table(2, 1, slot=math.nan), "whole number", id="slot NaN"),
        pytest.param(lambda: table(2, 9), r"K in 0\.\.8, got \(2, 27\)", id="depth"),
        pytest.param(lambda: table(0), r"R >= 1", id="no rows"),
        pytest.param(
            lambda: dataclasses.replace(table(), values=torch.zeros(2, 17)), "18", id="few columns"
        ),
        pytest.param(
            lambda: dataclasses.replace(table(), values=torch.zeros(18)), "shape", id="vector"
        ),
        pytest.param(
            lambda: dataclasses.replace(table(), timesteps=torch.zeros(3)),
            r"timesteps must have shape \(2,\) for 2 rows, got \(3,\)",
            id="timesteps",
        ),
        pytest.param(
            lambda: dataclasses.replace(table(), steps=torch.tensor([1, 2])),
            "begin at 0",
            id="late steps",
        ),
        pytest.param(
            lambda: dataclasses.replace(table(), steps=torch.tensor([0, -1])),
            "rise by 1",
            id="falling steps",
        ),
    ],
)
def test_tables_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_table_prints_one_line_a_row():
    sampler = DDIM(schedules.linear(1000), steps=1, grid="trailing")
    title, head, line = str(sampler).splitlines()
    assert title == "ddim: 1 steps, 1 evaluations, history of 0"
    names = ["x0_x", "x0_m", "clip_min", "clip_max", "out_x0"]  # columns that do something
    assert head.split() == ["step", "t", *names]
    step, t, *values = line.split()
    assert (int(step), float(t)) == (0, 999)
    for name, value in zip(names, values, strict=True):
        assert float(value) == pytest.approx(sampler.table.column(name)[0].item(), rel=1e-4)
    assert len(str(DDPM(schedules.linear(1000), steps=10)).splitlines()) == 12
    text = str(samplers.make("dpmpp-2m", SCHEDULE, 5).table)
    assert text.startswith("dpmpp-2m: 5 steps, 5 evaluations, history of 1\n")
    assert text.splitlines()[1].split()[-2:] == ["slot", "h_0"]


def test_samplers_by_name():
    schedule = schedules.cosine(100)
    assert set(samplers.names()) == set(LIVE)
    for name in samplers.names():
        sampler = samplers.make(name, schedule, 7)
        assert sampler.name == sampler.table.name == name
        assert sampler.steps == sampler.table.num_steps == 7
    made = samplers.make("ddim", schedule, 7, eta=0.3, grid="linspace")
    assert torch.equal(made.table.values, DDIM(schedule, 7, eta=0.3, grid="linspace").table.values)
    made = samplers.make("ddpm", schedule, 7, variance="learned")
    assert made.learned_variance
    assert made.table.learned_variance
    assert made.timesteps is made.table.timesteps


def test_the_grid_steps_to_its_own_next_timestep():
    """Not to t - T // n, which is wrong for linspace (diffusers' issues 12633 and 11347)."""
    schedule = schedules.linear(1000)
    sampler = DDIM(schedule, 3, grid=[999, 700, 20], clip=None)
    abar = schedule.alphas_cumprod
    assert sampler.timesteps.tolist() == [999, 700, 20]
    assert sampler.table.column("out_x0").square().tolist() == pytest.approx(
        [abar[700].item(), abar[20].item(), 1.0]
    )


def test_a_table_is_data():
    """Whoever has another method writes a table."""
    made = table(2, out_x=1.0, out_m=-0.5)
    assert made == made  # by identity: a comparison of tensors would have no one answer
    assert made != table(2, out_x=1.0, out_m=-0.5)
    x = torch.ones(1, 1, dtype=torch.float64)
    assert run_table(made, x, model=lambda x, t: x)[-1].item() == 0.25


def test_starting_later():
    sampler = samplers.make("dpmpp-2m", SCHEDULE, 10)
    later = sampler.starting_at(4)
    assert later.steps == 6
    assert torch.equal(later.timesteps, sampler.timesteps[4:])
    assert torch.equal(later.table.levels, sampler.table.levels[4:])
    assert later.table.steps.tolist() == list(range(6))
    assert not later.table.values[0, len(COLUMNS) :].any()  # nothing to look back on
    assert sampler.steps == 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: samplers.make("rk4", SCHEDULE, 5), "unknown sampler", id="name"),
        pytest.param(lambda: DDIM(SCHEDULE, 101), r"1\.\.100 .* got 101", id="ddim steps"),
        pytest.param(lambda: DDPM(SCHEDULE, 101), r"1\.\.100 .* got 101", id="ddpm steps"),
        pytest.param(lambda: DDIM(SCHEDULE, 0), r"1\.\.100", id="no steps"),
        pytest.param(lambda: DDIM(SCHEDULE, 5, eta=1.5), r"eta .* \[0, 1\], got 1.5", id="eta"),
        pytest.param(lambda: DDIM(SCHEDULE, 5, eta=-0.1), "eta", id="negative eta"),
        pytest.param(lambda: DDIM(SCHEDULE, 5, eta=math.nan), "eta", id="eta NaN"),
        pytest.param(lambda: DDIM(SCHEDULE, 5, prediction="u"), "prediction kind", id="kind"),
        pytest.param(lambda: DDPM(SCHEDULE, 5, prediction="u"), "prediction kind", id="ddpm kind"),
        pytest.param(lambda: DDIM(SCHEDULE, 5, grid="log"), "unknown grid", id="grid"),
        *(
            pytest.param(
                lambda clip=clip: DDIM(SCHEDULE, 5, clip=clip), "low < high", id=f"clip {clip}"
            )
            for clip in ((1.0, -1.0), (0.0, 0.0), (math.nan, 1.0))
        ),
        pytest.param(lambda: DDPM(SCHEDULE, 5, variance="big"), "unknown variance", id="variance"),
        pytest.param(
            lambda: DDIM(ZERO_SNR, 5, grid="trailing"),
            "zero signal at t = 99, where a prediction of eps says",
            id="eps at zero SNR",
        ),
        pytest.param(
            lambda: DDPM(ZERO_SNR, prediction="score"), "zero signal at t = 99", id="score at zero"
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_zero_terminal_snr_works_where_it_means_something():
    assert DDIM(ZERO_SNR, 5, grid="leading").timesteps[0] == 80  # never visits the last
    for prediction in ("v", "x0"):
        for sampler in (
            DDIM(ZERO_SNR, 5, grid="trailing", prediction=prediction, eta=1.0),
            DDPM(ZERO_SNR, prediction=prediction),
        ):
            assert sampler.timesteps[0] == 99
            finite = [i for i, c in enumerate(COLUMNS) if not c.startswith("clip")]
            assert bool(torch.isfinite(sampler.table.values[:, finite]).all())
