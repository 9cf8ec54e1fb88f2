"""The coefficient table: what a row means, how it prints, and the registry of samplers."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff import ops, samplers, schedules
from fastdiff.samplers import COLUMNS, DDIM, DDPM, Sampler
from fastdiff.samplers.table import clip_columns, grid, rows_for


def test_a_row_means_what_the_docstring_says():
    x, m, v, z = 0.3, -0.8, 0.4, 1.7
    row = dict(zip(COLUMNS, (0.9, -0.7, -0.5, 0.5, 0.2, 1.1, 0.3, 0.6, -1.2, 0.8), strict=True))
    x0 = min(max(row["x0_x"] * x + row["x0_m"] * m, row["clip_min"]), row["clip_max"])
    assert x0 == row["clip_max"]
    deviation = row["noise"] * math.exp((row["logvar"] + row["logvar_v"] * v) / 2)
    wanted = row["out_x"] * x + row["out_x0"] * x0 + row["out_m"] * m + deviation * z
    table = rows_for(2, **row)

    def pixel(*channels):
        return torch.tensor(channels, dtype=torch.float64).view(1, -1, 1, 1)

    got = ops.sampler_step(pixel(x), pixel(m, v), pixel(z), table, torch.tensor(1))
    assert got.item() == pytest.approx(wanted, rel=1e-14)


def test_rows_clip_nothing_unless_told():
    table = rows_for(3, out_x=torch.tensor([1.0, 2.0, 3.0]))
    assert table.shape == (3, len(COLUMNS))
    assert table.dtype == torch.float64
    assert table[:, COLUMNS.index("out_x")].tolist() == [1, 2, 3]
    assert table[:, COLUMNS.index("clip_min")].tolist() == [-math.inf] * 3
    assert table[:, COLUMNS.index("clip_max")].tolist() == [math.inf] * 3
    assert clip_columns(None) == {}
    assert clip_columns((-2.0, 3.0)) == {"clip_min": -2.0, "clip_max": 3.0}


@pytest.mark.parametrize("clip", [(1.0, -1.0), (0.0, 0.0), (math.nan, 1.0)], ids=str)
def test_reversed_clip(clip):
    with pytest.raises(ValueError, match="low < high"):
        clip_columns(clip)


def test_a_table_prints_one_line_a_step():
    sampler = DDIM(schedules.linear(1000), steps=1, spacing="trailing")
    head, line = str(sampler).splitlines()
    assert head.split() == ["t", *COLUMNS]
    t, *values = line.split()
    assert int(t) == 999
    for value, wanted in zip(values, sampler.table[0].tolist(), strict=True):
        assert float(value) == pytest.approx(wanted, rel=1e-4)
    assert len(str(DDPM(schedules.linear(1000), steps=10)).splitlines()) == 11


def test_the_grid_steps_to_its_own_next_timestep():
    """Not to t - T // n, which is wrong for linspace (diffusers' issues 12633 and 11347)."""
    schedule = schedules.linear(1000)
    timesteps = torch.tensor([999, 700, 20])
    g = grid(schedule, timesteps, "eps", final_abar=0.9)
    abar = schedule.alphas_cumprod
    assert g.abar.tolist() == [abar[999].item(), abar[700].item(), abar[20].item()]
    assert g.abar_prev.tolist() == [abar[700].item(), abar[20].item(), 0.9]


def test_samplers_by_name():
    schedule = schedules.cosine(100)
    assert samplers.names() == ("ddim", "ddpm")
    made = samplers.make("ddim", schedule, 7, eta=0.3, spacing="linspace")
    assert torch.equal(made.table, DDIM(schedule, 7, eta=0.3, spacing="linspace").table)
    made = samplers.make("ddpm", schedule, 7, variance="learned")
    assert made.learned_variance
    assert made.steps == 7


def test_a_sampler_is_data():
    """Whoever has another method writes a table."""
    euler = Sampler(torch.tensor([1, 0]), rows_for(2, out_x=1.0, out_m=-0.5))
    assert euler.steps == 2
    assert not euler.needs_noise
    assert not euler.learned_variance
    assert DDPM(schedules.linear(10)).needs_noise
    assert euler == euler  # by identity: a comparison of tables would have no one answer
    assert euler != Sampler(euler.timesteps, euler.table)


SCHEDULE = schedules.linear(100)
ZERO_SNR = schedules.rescale_zero_terminal_snr(SCHEDULE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: samplers.make("euler", SCHEDULE, 5), "unknown sampler", id="name"),
        pytest.param(lambda: DDIM(SCHEDULE, 101), r"1\.\.100 .* got 101", id="ddim steps"),
        pytest.param(lambda: DDPM(SCHEDULE, 101), r"1\.\.100 .* got 101", id="ddpm steps"),
        pytest.param(lambda: DDIM(SCHEDULE, 0), r"1\.\.100", id="no steps"),
        pytest.param(lambda: DDIM(SCHEDULE, 5, eta=1.5), r"eta .* \[0, 1\], got 1.5", id="eta"),
        pytest.param(lambda: DDIM(SCHEDULE, 5, eta=-0.1), "eta", id="negative eta"),
        pytest.param(lambda: DDIM(SCHEDULE, 5, eta=math.nan), "eta", id="eta NaN"),
        pytest.param(lambda: DDIM(SCHEDULE, 5, prediction="u"), "prediction kind", id="kind"),
        pytest.param(lambda: DDPM(SCHEDULE, 5, prediction="u"), "prediction kind", id="ddpm kind"),
        pytest.param(lambda: DDIM(SCHEDULE, 5, spacing="log"), "unknown spacing", id="spacing"),
        pytest.param(lambda: DDIM(SCHEDULE, 5, clip=(1, -1)), "low < high", id="clip"),
        pytest.param(lambda: DDPM(SCHEDULE, 5, variance="big"), "unknown variance", id="variance"),
        pytest.param(
            lambda: DDIM(ZERO_SNR, 5, spacing="trailing"),
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
    assert DDIM(ZERO_SNR, 5, spacing="leading").timesteps[0] == 80  # never visits the last
    for prediction in ("v", "x0"):
        for sampler in (
            DDIM(ZERO_SNR, 5, spacing="trailing", prediction=prediction, eta=1.0),
            DDPM(ZERO_SNR, prediction=prediction),
        ):
            assert sampler.timesteps[0] == 99
            finite = sampler.table[:, [i for i, c in enumerate(COLUMNS) if c[:4] != "clip"]]
            assert bool(torch.isfinite(finite).all())
