"""sampler_step on the GPU kernels: each part of a row, and what must not be read or written."""

from __future__ import annotations

import pytest
import torch
from accuracy import LAYOUT_IDS, LAYOUTS
from conftest import DTYPE_IDS, DTYPES
from gpu_accuracy import assert_close_to_oracle
from test_sampler_step import FEATURES, SHAPES, make, overlapping, run, table_of

import fastdiff
from fastdiff import ops, samplers, schedules
from fastdiff.ops.sampler_step import COLUMNS

EVERYTHING = FEATURES["everything"]
# By image and walked through as one, in vectors and not, in one tile and in several.
LONG = {"vectors": (2, 4, 16, 20), "odd": (2, 3, 19, 21)}


def made(gpu, *arguments, **columns):
    """What test_sampler_step makes, on the device."""
    values = make(*arguments, **columns)
    return [None if value is None else value.to(gpu.device) for value in values]


def table_for(gpu, **columns):
    return table_of(**columns).to(gpu.device)


def wanted_of(*arguments):
    """What the reference computes in float64."""
    doubles = (t.double() if t is not None and t.is_floating_point() else t for t in arguments)
    with fastdiff.backend("reference"):
        return [value.to(arguments[0].dtype) for value in run(*doubles)]


def assert_close(found, wanted, **tolerance) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_values(gpu, dtype, feature) -> None:
    shape = SHAPES["odd" if dtype == torch.float32 else "latent"]
    for layout in LAYOUTS:
        assert_close_to_oracle(run, *made(gpu, shape, dtype, layout, **feature))


@pytest.mark.parametrize("feature", ["plain", "learned", "everything"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("shape", LONG.values(), ids=LONG)
def test_several_tiles(gpu, shape, layout, feature) -> None:
    assert_close_to_oracle(run, *made(gpu, shape, torch.float32, layout, **FEATURES[feature]))


@pytest.mark.parametrize("shape", [(1, 5), (9, 2), (3, 2, 7), (2, 3, 2, 3, 5), (1, 1, 1, 1)])
def test_any_number_of_dimensions(gpu, shape) -> None:
    for feature in ("history", "everything"):
        if feature == "everything" and shape == (1, 1, 1, 1):
            continue  # an image of one value has no deviation to rescale by
        assert_close_to_oracle(run, *made(gpu, shape, **FEATURES[feature]))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (0, 0)])
def test_nothing(gpu, shape) -> None:
    x, *_ = arguments = made(gpu, shape, **EVERYTHING)
    assert run(*arguments)[0].shape == x.shape


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_in_place_is_the_same(gpu, feature) -> None:
    layout = torch.channels_last if "depth" in feature else torch.contiguous_format
    arguments = made(gpu, (1, 3, 19, 21), layout=layout, **feature)
    x, out, history, noise, table, step, seed = arguments
    wanted = run(*arguments)
    own = x.clone()
    assert ops.sampler_step(own, out, history, noise, table, step, seed=seed, out=own) is own
    assert torch.equal(own, wanted[0])
    if history is not None:
        assert torch.equal(history.nan_to_num(0), wanted[1])


@pytest.mark.parametrize("columns", [{}, {"quantile": 0.8, "clip_max": 3.0}], ids=["row", "image"])
def test_out_may_overlap_what_is_read(gpu, columns) -> None:
    table, step = table_for(gpu, noise=0.5, guidance=2.0, **columns), torch.tensor(4)
    for name, *tensors, _ in overlapping():
        memory = tensors[0].untyped_storage().nbytes() // 4
        whole = tensors[0].as_strided((memory,), (1,), 0).to(gpu.device)
        x, model_out, noise, out = (
            None if t is None else whole.as_strided(t.shape, t.stride(), t.storage_offset())
            for t in (*tensors, _)
        )
        copies = [None if t is None else t.clone() for t in (x, model_out, noise)]
        number = step.to(gpu.device)
        wanted = ops.sampler_step(*copies[:2], None, copies[2], table, number)
        assert ops.sampler_step(x, model_out, None, noise, table, number, out=out) is out
        assert torch.equal(out, wanted), name


@pytest.mark.parametrize("feature", ["learned", "everything"])
def test_strides(gpu, feature) -> None:
    """Every tensor in strides of its own, and the results in the strides that were given."""
    columns = {"noisy": True, **FEATURES[feature]} | {"seeded": False}
    arguments = made(gpu, (2, 4, 6, 6), **columns)
    wanted = run(*arguments)
    x, out, history, noise, table, step, _ = arguments

    def scattered(value):
        return value.repeat_interleave(2, dim=-1)[..., ::2]

    x, noise, out = x.transpose(2, 3).contiguous().transpose(2, 3), scattered(noise), scattered(out)
    history = None if history is None else scattered(history)
    new = torch.full((2, 4, 6, 12), 7.0, device=gpu.device)
    table = scattered(table.T.contiguous().T)
    got = ops.sampler_step(x, out, history, noise, table, step.view(1, 1), out=new[..., ::2])
    assert_close([got], wanted[:1])
    assert (new[..., 1::2] == 7).all()
    if history is not None:
        assert_close([history.nan_to_num(0)], wanted[1:])


def test_memory_formats(gpu) -> None:
    x, out, history, noise, *others = arguments = made(gpu, (2, 4, 6, 6), **EVERYTHING)
    wanted = run(*arguments)
    x = x.contiguous(memory_format=torch.channels_last)
    got = run(x, out, history, noise, *others)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert_close(got, wanted)


@pytest.mark.parametrize("feature", ["plain", "seed", "threshold", "everything"])
@pytest.mark.parametrize("number", [-1, 6, 2**40, -(2**63)])
def test_a_step_outside_the_table_gives_nan(gpu, number, feature) -> None:
    """A CPU refuses it; looking at it on a GPU would wait for the GPU."""
    x, out, history, noise, table, step, seed = made(gpu, **FEATURES[feature])
    table = table.nan_to_num(0.5)
    before = None if history is None else history.clone()
    got = torch.zeros_like(x)
    ops.sampler_step(x, out, history, noise, table, step * 0 + number, seed=seed, out=got)
    assert got.isnan().all()
    if history is not None:
        torch.testing.assert_close(history, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("slot", [-1.0, -0.5, 3.0, 1e30, torch.inf, -torch.inf, torch.nan])
def test_a_slot_outside_the_history_is_not_written(gpu, slot) -> None:
    x, out, history, noise, table, step, _ = made(gpu, depth=3, h1=0.5, slot=slot, keep_x=1.0)
    before = history.clone()
    got = ops.sampler_step(x, out, history, noise, table, step)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(history, before, rtol=0, atol=0, equal_nan=True)


def test_nothing_is_read_or_written_without_a_coefficient(gpu) -> None:
    """Noise, variance and slots may hold NaN where their coefficient is 0."""
    x, out, history, noise, table, step, _ = made(
        gpu, depth=3, noisy=True, learned=True, h1=0.5, logvar_v=0.7
    )
    history[0], history[2], noise[:], out[:, 3:] = (torch.nan,) * 4
    before = history.clone()
    got = ops.sampler_step(x, out, history, noise, table, step)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(history, before, rtol=0, atol=0, equal_nan=True)
    table = table_for(gpu, depth=3, noise=0.3, h1=0.5)  # nor is the variance read
    assert torch.isfinite(ops.sampler_step(x, out, history, x, table, step)).all()
    # Noise that is only kept is nothing to the next x, and the other way about.
    table = table_for(gpu, depth=3, h1=0.5, keep_noise=0.5, slot=0.0)
    assert torch.isfinite(ops.sampler_step(x, out, history, noise, table, step)).all()
    assert history[0].isnan().all()
    table = table_for(gpu, depth=3, h1=0.5, noise=0.5, slot=2.0)
    assert ops.sampler_step(x, out, history, noise, table, step).isnan().all()
    assert torch.isfinite(history[2]).all()


def test_keeps_nan_where_it_is(gpu) -> None:
    x, out, _, _, table, step, _ = made(gpu)
    out[1, 2, 3, 4] = torch.nan
    broken = torch.isnan(ops.sampler_step(x, out, None, None, table, step))
    assert torch.equal(broken, torch.isnan(out))
    # Statistics of an image with NaN are NaN: that image is, and no other.
    for columns, both in (({"quantile": 0.5}, out), ({"rescale": 0.5}, torch.cat([x, out]))):
        table = table_for(gpu, guidance=2.0, **columns)
        got = ops.sampler_step(x, both, None, None, table, step)
        assert not torch.isnan(got[0]).any()
        assert torch.isnan(got[1]).all()


def test_degenerate_statistics(gpu) -> None:
    """A constant prediction is not rescaled; quantiles beyond the ends are the ends."""
    x, _, _, _, _, step, _ = made(gpu)
    out = torch.cat([torch.full_like(x, 0.1), torch.full_like(x, 0.3)])
    rescaled, plain = (table_for(gpu, guidance=3.1, rescale=r) for r in (0.7, 0.0))
    a, b = (ops.sampler_step(x, out, None, None, t, step) for t in (rescaled, plain))
    assert torch.equal(a, b)
    for q in (1.0, 1e-9, 3.0):
        arguments = [x * 4, x * 4, None, None, table_for(gpu, quantile=q, clip_max=9.0), step, None]
        assert_close(run(*arguments), wanted_of(*arguments))


def test_statistics_of_a_small_deviation(gpu) -> None:
    """The deviation is that of the values less their mean: 0.1 on 1000 is not lost."""
    arguments = made(gpu, (2, 3, 20, 31), guided=True, guidance=3.0, rescale=0.7)
    arguments[1] = arguments[1] * 0.1 + 1000
    assert_close_to_oracle(run, *arguments)


@pytest.mark.parametrize("quantile", [1e-6, 0.3, 0.5, 0.995, 1.0])
def test_the_quantile_is_exact(gpu, quantile) -> None:
    """Many equal values, two sizes far apart, and the place between two values."""
    for shape in ((2, 1, 1, 7), (1, 3, 19, 21)):
        x, *_ = made(gpu, shape)
        for values in (x.mul(3).round(), x * 10.0 ** x.mul(4).round(), x * 0):
            m = torch.zeros_like(x)
            columns = {"x0_x": 1.0, "x0_m": 0.0, "out_x": 0.0, "out_x0": 1.0, "out_m": 0.0}
            table = table_for(gpu, quantile=quantile, clip_max=1e30, **columns)
            step = torch.tensor(4, device=gpu.device)
            arguments = [values, m, None, None, table, step, None]
            assert_close(run(*arguments), wanted_of(*arguments), rtol=1e-6, atol=1e-7)


def test_an_image_does_not_depend_on_its_batch(gpu) -> None:
    x, out, history, _, table, step, seed = arguments = made(gpu, (3, 3, 17, 29), **EVERYTHING)
    whole = run(*arguments)
    for n in range(3):
        alone = run(x[n : n + 1], out[n::3], history[:, n : n + 1], None, table, step, seed[n:][:1])
        assert torch.equal(alone[0], whole[0][n : n + 1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_noise_of_a_seed_is_philox_normal(gpu, layout) -> None:
    *most, seed = arguments = made(gpu, (2, 3, 5, 7), layout=layout, **EVERYTHING)
    most[3] = ops.philox_normal(seed, 4, most[0].shape)
    assert_close(run(*arguments), run(*most, None), rtol=1e-6, atol=1e-6)


def test_the_row_is_read_on_the_device(gpu) -> None:
    """The same arguments, one of them counted on in place."""
    x, out, _, _, table, step, _ = made(gpu)
    table[1] = table_of(out_x=2.0)[4].to(gpu.device)
    first = ops.sampler_step(x, out, None, None, table, step)
    step.fill_(1)
    second = ops.sampler_step(x, out, None, None, table, step)
    assert not torch.equal(first, second)
    assert_close([second], wanted_of(x, out, None, None, table, step, None))


def test_autograd_knows_what_was_written(gpu) -> None:
    x, out, history, noise, table, step, seed = made(gpu, (2, 3, 5, 7), **EVERYTHING)
    target = torch.empty_like(x)
    before = [value._version for value in (x, target, history)]
    ops.sampler_step(x, out, history, noise, table, step, seed=seed, out=target)
    after = [value._version for value in (x, target, history)]
    assert after[0] == before[0]
    assert after[1] > before[1]
    assert after[2] > before[2]
    with torch.inference_mode():  # whose tensors have no version
        ops.sampler_step(x.clone(), out, history.clone(), noise, table, step, seed=seed)


OVERLAPPING = ("x", "model_out", "noise", "out", "itself")


@pytest.mark.parametrize("other", OVERLAPPING)
def test_a_history_that_overlaps_is_refused(gpu, other) -> None:
    wide = torch.zeros(3, 2, 3, 4, 4, device=gpu.device)
    table = torch.zeros(5, len(COLUMNS) + 2, device=gpu.device)
    tensors = {name: torch.zeros_like(wide[0]) for name in OVERLAPPING[:4]}
    history = wide[1:]
    if other == "itself":
        history = wide[:1].expand(2, -1, -1, -1, -1)
    else:
        tensors[other] = wide[2]
    x, model_out, noise, out = tensors.values()
    step = torch.tensor(0, device=gpu.device)
    with pytest.raises(ValueError, match="history must not overlap"):
        ops.sampler_step(x, model_out, history, noise, table, step, out=out)


def walked(gpu, table, x, rows):
    """Every x of the first rows of a table; the history begins as NaN, as no table reads that."""
    values = table.values.to(gpu.device, torch.float32)
    history = ops.new_history(x, table.depth).fill_(torch.nan) if table.depth else None
    seed = torch.tensor([[7, 0], [7, 1]], device=gpu.device)
    path = [x]
    for row in range(rows):
        out = torch.sin(2 * path[-1] + 0.01 * float(table.timesteps[row])) + 0.3 * path[-1]
        step = torch.tensor(row, device=gpu.device)
        path.append(ops.sampler_step(path[-1], out, history, None, values, step, seed=seed))
    return torch.stack(path)


@pytest.mark.parametrize("name", samplers.names())
def test_tables_of_samplers(gpu, name) -> None:
    sampler = samplers.make(name, schedules.linear(), 10)
    x, *_ = made(gpu, (2, 3, 4, 5))
    x = x * sampler.table.init_noise_sigma
    got = walked(gpu, sampler.table, x, 6)
    with fastdiff.backend("reference"):
        wanted = walked(gpu, sampler.table, x, 6)
    assert torch.isfinite(wanted).all()
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)
