"""sampler_step: the row's formula and its parts, layouts, strides, aliasing and refusals."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from accuracy import DTYPE_IDS, DTYPES, LAYOUT_IDS, LAYOUTS, CountCalls, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops
from fastdiff.ops import reference
from fastdiff.ops.sampler_step import COLUMNS, MAX_HISTORY

SHAPES = {"odd": (3, 3, 5, 7), "latent": (2, 4, 8, 8), "one pixel": (2, 5, 1, 1),
          "long": (2, 3, 20, 31)}  # fmt: skip
DEFAULTS = {"guidance": 1.0, "x0_x": 1.2, "x0_m": -0.7, "clip_min": -0.7, "clip_max": 0.9,
            "out_x": 0.3, "out_x0": 0.8, "out_m": -0.4, "slot": -1.0}  # fmt: skip
NOISY = {"noise": 0.6, "logvar": -0.5}
# What a row can ask for: its columns beside DEFAULTS and the model's output that goes with it.
FEATURES = {
    "plain": {},
    "noise": dict(NOISY, noisy=True),
    "seed": dict(NOISY, seeded=True),
    "learned": dict(NOISY, noisy=True, learned=True, logvar_v=0.8),
    "learned, fixed row": dict(NOISY, noisy=True, learned=True),
    "learned, last step": {"learned": True},
    "guided": {"guided": True, "guidance": 3.0},
    "rescaled": {"guided": True, "guidance": 3.0, "rescale": 0.7},
    "threshold": {"quantile": 0.8, "clip_max": 5.0},
    "history": {"depth": 3, "h0": 0.5, "h2": -0.3, "slot": 1.0, "keep_x0": 0.7, "keep_m": 0.2},
    "history in place": {"depth": 1, "h0": 0.5, "slot": 0.0, "keep_x": 0.7},
    "kept noise": {"depth": 2, "slot": 1.0, "keep_noise": 0.4, "keep_x": 1.0, "noisy": True},
    "everything": dict(
        NOISY, seeded=True, learned=True, logvar_v=0.8, guided=True, guidance=2.0, rescale=0.5,
        quantile=0.9, clip_max=3.0, depth=8, h0=0.1, h3=0.4, h7=-0.2, slot=3.0, keep_x=0.3,
        keep_x0=0.2, keep_m=0.5, keep_noise=0.6,
    ),
}  # fmt: skip


def table_of(dtype=torch.float32, depth=0, **columns):
    """A table whose row 4 has these columns; the others are NaN and must not be read."""
    table = torch.full((6, len(COLUMNS) + depth), torch.nan, dtype=torch.float64)
    names = [*COLUMNS, *(f"h{j}" for j in range(depth))]
    columns = {**DEFAULTS, **columns}
    table[4] = torch.tensor([columns.pop(name, 0.0) for name in names])
    assert not columns
    return table.to(torch.float64 if dtype == torch.float64 else torch.float32)


def make(
    shape=(2, 3, 4, 5), dtype=torch.float32, layout=torch.contiguous_format, *, noisy=False,
    seeded=False, learned=False, guided=False, depth=0, generator_seed=0, **columns,
):  # fmt: skip
    """The operation's arguments in the order of its schema, without out."""
    g = torch.Generator().manual_seed(generator_seed)

    def normal(*size):
        value = torch.randn(size, generator=g).to(dtype)
        return value.contiguous(memory_format=layout) if len(size) == 4 else value

    n, c, *rest = shape
    x = normal(*shape) + 0.5
    history = ops.new_history(x, depth) if depth else None
    for j in range(depth):
        history[j] = torch.randn(shape, generator=g)
        if not columns.get(f"h{j}"):
            history[j] = torch.nan
    return [
        x, normal(n * (1 + guided), c * (1 + learned), *rest) + 0.2, history,
        normal(*shape) if noisy else None, table_of(dtype, depth, **columns), torch.tensor(4),
        torch.tensor([2**40 + 3, 5]) + torch.arange(n)[:, None] if seeded else None,
    ]  # fmt: skip


def run(x, model_out, history, noise, table, step, seed):
    """The next x and what was kept, with NaN slots counted as 0; the history stays as it is."""
    history = None if history is None else history.clone()
    out = ops.sampler_step(x, model_out, history, noise, table, step, seed=seed)
    return [out] if history is None else [out, history.nan_to_num(0)]


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values(shape, dtype, layout, feature) -> None:
    assert_as_accurate(run, *make(shape, dtype, layout, **feature))


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 4), dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS), learned=st.booleans(), guided=st.booleans(),
    z=st.sampled_from([{}, {"noisy": True}, {"seeded": True}]), depth=st.integers(0, MAX_HISTORY),
    columns=st.fixed_dictionaries(
        {name: st.sampled_from([0.0, 0.5, -0.8]) for name in ("noise", "logvar", "logvar_v",
         "keep_x", "keep_x0", "keep_m", "keep_noise", "out_m", "out_x", "out_x0")}
        | {"quantile": st.sampled_from([0.0, 0.7, 1.0]), "guidance": st.sampled_from([0.0, 2.5]),
           "rescale": st.sampled_from([0.0, 0.6])}
    ),
    data=st.data(),
)  # fmt: skip
def test_any_row(shape, dtype, layout, learned, guided, z, depth, columns, data) -> None:
    slots = {f"h{j}": data.draw(st.sampled_from([0.0, 0.4])) for j in range(depth)}
    slot = float(data.draw(st.integers(-1, depth - 1)))
    arguments = make(shape, dtype, layout, learned=learned, guided=guided, depth=depth, slot=slot,
                     **z, **columns, **slots)  # fmt: skip
    assert_as_accurate(run, *arguments, cancelling=True)


def by_hand(c, x, m_u, m_c, v, z, history):
    """Next x and kept of one image, lists of Python floats, as fastdiff.samplers.table says."""

    def std(values):
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((value - mean) ** 2 for value in values))

    m = [u + c["guidance"] * (w - u) for u, w in zip(m_u, m_c, strict=True)]
    ratio = std(m_c) / std(m)
    m = [value * (1 - c["rescale"] + c["rescale"] * ratio) for value in m]
    x0 = [c["x0_x"] * a + c["x0_m"] * b for a, b in zip(x, m, strict=True)]
    if c["quantile"] > 0:
        ordered = sorted(map(abs, x0))
        place = c["quantile"] * (len(x0) - 1)
        low, high = ordered[int(place)], ordered[math.ceil(place)]
        s = min(max(low + (place - int(place)) * (high - low), 1), c["clip_max"])
        x0 = [min(max(value, -s), s) / s for value in x0]
    else:
        x0 = [min(max(value, c["clip_min"]), c["clip_max"]) for value in x0]
    new, kept = [], []
    for i in range(len(x)):
        deviation = math.exp((c["logvar"] + c["logvar_v"] * v[i]) / 2)
        new.append(
            c["out_x"] * x[i] + c["out_x0"] * x0[i] + c["out_m"] * m[i]
            + sum(c[f"h{j}"] * slot[i] for j, slot in enumerate(history))
            + c["noise"] * deviation * z[i]
        )  # fmt: skip
        kept.append(
            c["keep_x"] * x[i] + c["keep_x0"] * x0[i] + c["keep_m"] * m[i] + c["keep_noise"] * z[i]
        )
    return new, kept


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("quantile", [0.0, 0.75])
def test_the_formula(quantile, backend) -> None:
    g = torch.Generator().manual_seed(1)
    names = [*COLUMNS, "h0", "h1"]
    c = dict(zip(names, (torch.rand(20, generator=g) + 0.5).tolist(), strict=True))
    c |= {"quantile": quantile, "clip_min": -0.8, "clip_max": 1.9, "slot": 1.0}
    table = torch.tensor([[0.0] * 20, [c[name] for name in names]], dtype=torch.float64)
    x, z, m_u, m_c, v_u, v = torch.randn(6, 1, 2, 3, 1, generator=g, dtype=torch.float64) * 2
    history = torch.randn(2, 1, 2, 3, 1, generator=g, dtype=torch.float64)
    out = torch.cat([torch.cat([m_u, v_u], dim=1), torch.cat([m_c, v], dim=1)])
    new, kept = by_hand(
        c, *(t.flatten().tolist() for t in (x, m_u, m_c, v, z)), history.flatten(1).tolist()
    )
    first = history[0].clone()
    with fastdiff.backend(backend):
        got = ops.sampler_step(x, out, history, z, table, torch.tensor(1))
    torch.testing.assert_close(got.flatten(), torch.tensor(new, dtype=torch.float64))
    torch.testing.assert_close(history[1].flatten(), torch.tensor(kept, dtype=torch.float64))
    assert torch.equal(history[0], first)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_noise_of_a_seed_is_philox_normal(dtype, layout) -> None:
    arguments = make((3, 3, 17, 29), dtype, layout, **FEATURES["everything"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    *most, seed = arguments
    most[3] = ops.philox_normal(seed, 4, most[0].shape, wide)
    whole = run(*arguments)
    if dtype == wide:
        for a, b in zip(whole, run(*most, None), strict=True):
            assert torch.equal(a, b)
    # An image's noise does not depend on the batch it is in, nor on the layout.
    x, out, history, _, table, step, _ = arguments
    for n in range(3):
        alone = run(x[n : n + 1], out[n::3], history[:, n : n + 1], None, table, step, seed[n:][:1])
        assert torch.equal(alone[0], whole[0][n : n + 1])
    other = run(x.flip(2).flip(2), *arguments[1:])  # flip gives channels-first
    torch.testing.assert_close(other[0], whole[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_threads_and_pieces_change_nothing() -> None:
    shape = (2, 3, 128, 131)  # enough for two threads, no multiple of a block
    arguments = make(shape, **FEATURES["everything"])
    many = run(*arguments)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(*arguments)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))
    assert_as_accurate(run, *arguments)


def test_no_clipping_and_infinite_limits() -> None:
    x, *others = make(clip_min=-torch.inf, clip_max=torch.inf)
    assert_as_accurate(run, x * 1e6, *others)
    assert_as_accurate(run, *make(quantile=0.99, clip_max=torch.inf))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_degenerate_statistics(backend) -> None:
    """A constant prediction is not rescaled; quantiles beyond the ends are the ends."""
    x, _, _, _, _, step, _ = make()
    out = torch.cat([torch.full_like(x, 0.1), torch.full_like(x, 0.3)])
    rescaled, plain = (table_of(guidance=3.1, rescale=r) for r in (0.7, 0.0))
    one, few = table_of(quantile=1.0, clip_max=9.0), table_of(quantile=1e-9, clip_max=9.0)
    with fastdiff.backend(backend):
        a, b = (ops.sampler_step(x, out, None, None, t, step) for t in (rescaled, plain))
        assert torch.equal(a, b)
        for table, pick in ((one, torch.amax), (few, torch.amin)):
            free = (1.2 - 0.7) * x * 4
            got = ops.sampler_step(x * 4, x * 4, None, None, table, step)
            s = pick(free.abs(), (1, 2, 3), keepdim=True).clamp(min=1)
            wanted = (0.3 - 0.4) * 4 * x + 0.8 * free.clamp(-s, s) / s
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_keeps_nan_where_it_is(backend) -> None:
    x, out, _, _, table, step, _ = make()
    out[1, 2, 3, 4] = torch.nan
    with fastdiff.backend(backend):
        broken = torch.isnan(ops.sampler_step(x, out, None, None, table, step))
        assert torch.equal(broken, torch.isnan(out))
        # Statistics of an image with NaN are NaN: that image is, and no other.
        for columns, both in (({"quantile": 0.5}, out), ({"rescale": 0.5}, torch.cat([x, out]))):
            got = ops.sampler_step(x, both, None, None, table_of(guidance=2.0, **columns), step)
            assert not torch.isnan(got[0]).any()
            assert torch.isnan(got[1]).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_is_read_or_written_without_a_coefficient(backend) -> None:
    """Noise, variance and slots may hold NaN where their coefficient is 0."""
    x, out, history, noise, table, step, _ = make(
        depth=3, noisy=True, learned=True, h1=0.5, logvar_v=0.7
    )
    history[0], history[2], noise[:], out[:, 3:] = (torch.nan,) * 4
    before = history.clone()
    with fastdiff.backend(backend):
        got = ops.sampler_step(x, out, history, noise, table, step)
        assert torch.isfinite(got).all()
        torch.testing.assert_close(history, before, rtol=0, atol=0, equal_nan=True)
        table = table_of(depth=3, noise=0.3, h1=0.5)  # nor is the variance read
        assert torch.isfinite(ops.sampler_step(x, out, history, x, table, step)).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_in_place_is_the_same(feature, layout, backend) -> None:
    arguments = make((2, 3, 20, 31), layout=layout, **feature)
    x, out, history, noise, table, step, seed = arguments
    with fastdiff.backend(backend):
        wanted = run(*arguments)
        own = x.clone()
        version = own._version
        got = ops.sampler_step(own, out, history, noise, table, step, seed=seed, out=own)
    assert got is own
    assert own._version > version
    assert torch.equal(own, wanted[0])
    if history is not None:
        assert torch.equal(history.nan_to_num(0), wanted[1])


def overlapping():
    """Tensors of one storage: out reads or is read by others, at the same element or elsewhere."""
    memory = torch.randn(4 * 60 + 60, generator=torch.Generator().manual_seed(0))

    def image(at, n=2):
        return memory[at : at + n * 60].view(n, 3, 4, 5)

    x, elsewhere = image(0), image(31)
    yield "the model returns its input", x, x, None, x
    yield "the guided model returns its input", image(0), image(0, 4), None, image(0)
    yield "out is the conditional half", image(200, 1), image(0, 2), None, image(60, 1)
    yield "out lies across x", x, image(180), None, elsewhere
    yield "out lies across the model's output", image(180), x, None, elsewhere
    yield "out lies across the noise", image(180), image(180), x, elsewhere
    square = memory[:96].view(2, 3, 4, 4)
    yield "out is x, transposed", square, square + 1, None, square.transpose(2, 3)


@pytest.mark.parametrize("case", list(overlapping()), ids=lambda case: case[0])
def test_out_may_overlap_what_is_read(case) -> None:
    _, x, model_out, noise, out = case
    table, step = table_of(noise=0.5, guidance=2.0), torch.tensor(4)
    copies = [None if t is None else t.clone() for t in (x, model_out, noise)]
    wanted = ops.sampler_step(*copies[:2], None, copies[2], table, step)
    assert ops.sampler_step(x, model_out, None, noise, table, step, out=out) is out
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("feature", ["learned", "everything"])
def test_strides(feature) -> None:
    """Every tensor in strides of its own, and the results in the strides that were given."""
    arguments = make((2, 4, 6, 6), **{"noisy": True, **FEATURES[feature]} | {"seeded": False})
    wanted = run(*arguments)
    x, out, history, noise, table, step, _ = arguments

    def scattered(value):
        return value.repeat_interleave(2, dim=-1)[..., ::2]

    x, noise, out = x.transpose(2, 3).contiguous().transpose(2, 3), scattered(noise), scattered(out)
    history = None if history is None else scattered(history)
    new = torch.full((2, 4, 6, 12), 7.0)
    table = scattered(table.T.contiguous().T)
    got = ops.sampler_step(x, out, history, noise, table, step.view(1, 1), out=new[..., ::2])
    assert torch.equal(got, wanted[0])
    assert (new[..., 1::2] == 7).all()
    if history is not None:
        assert torch.equal(history.nan_to_num(0), wanted[1])


def test_memory_formats() -> None:
    arguments = make((2, 4, 6, 6), **FEATURES["everything"])
    wanted = run(*arguments)
    x, out, history, noise, *others = arguments
    x = x.contiguous(memory_format=torch.channels_last)
    got = run(x, out, history, noise, *others)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert ops.new_history(x, 2)[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (0, 0), (3, 2)])
def test_nothing_and_vectors(shape, feature, backend) -> None:
    with fastdiff.backend(backend):
        x, *_ = arguments = make(shape, **feature)
        assert run(*arguments)[0].shape == x.shape


def test_new_history() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    history = ops.new_history(x, 3)
    assert (history.shape, history.dtype) == ((3, 2, 3, 4, 5), torch.float32)
    assert history[2].stride() == x.stride()
    assert not history.any()
    assert ops.new_history(x.double(), 0).shape == (0, 2, 3, 4, 5)
    for depth in (-1, MAX_HISTORY + 1):
        with pytest.raises(ValueError, match=f"0..{MAX_HISTORY}, got {depth}"):
            ops.new_history(x, depth)


def schema_of(arguments):
    return (*arguments, torch.empty_like(arguments[0]))


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_opcheck(feature) -> None:
    arguments = schema_of(make(**feature))
    for value in arguments:
        if value is not None and value.is_floating_point() and value.ndim == 5:
            value.nan_to_num_(0)  # opcheck compares
    torch.library.opcheck(torch.ops.fastdiff.sampler_step.default, arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled(in_place, backend) -> None:
    *arguments, seed = make(**FEATURES["everything"])
    x, out, history, noise, table, step = arguments

    def once(x, history):
        target = x if in_place else None
        y = ops.sampler_step(x * 1, out, history, noise, table, step, seed=seed, out=target)
        return y * 2

    torch.compiler.reset()
    with fastdiff.backend(backend):
        compiled = torch.compile(once, fullgraph=True, backend="aot_eager")
        pairs = [(x.clone(), history.clone()) for _ in range(2)]
        a, b = compiled(*pairs[0]), once(*pairs[1])
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(pairs[0], pairs[1], equal_nan=True)


def test_the_row_is_read_when_it_runs() -> None:
    """A compiled or captured loop advances the step in place."""
    x, out, _, _, table, step, _ = make()
    table[1] = table_of(out_x=2.0)[4]
    compiled = torch.compile(ops.sampler_step, fullgraph=True, backend="aot_eager")
    compiled(x, out, None, None, table, step)
    step.fill_(1)
    wanted = ops.sampler_step(x, out, None, None, table, torch.tensor(1))
    assert torch.equal(compiled(x, out, None, None, table, step), wanted)


def test_the_reference_reads_nothing_on_the_host() -> None:
    """So that it can be captured in a CUDA graph; meta tensors stand for a GPU's."""
    arguments = make(**FEATURES["everything"])
    *most, seed = (None if value is None else value.to("meta") for value in arguments)
    with CountCalls() as counted:
        reference.sampler_step(*most, seed, torch.empty_like(most[0]))
    assert counted.names
    refused = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "lift_fresh")
    assert not [name for name in counted.names if name.split(".")[1] in refused]


@pytest.mark.gpu
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_captured(feature) -> None:
    arguments = make(**feature)
    wanted = run(*arguments)
    *most, seed = [None if t is None else t.cuda() for t in arguments]
    x, history = most[0], most[2]
    new = torch.empty_like(x)
    kept = None if history is None else history.clone()

    def once():
        ops.sampler_step(*most, seed=seed, out=new)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()  # warm up
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    new.fill_(torch.nan)
    if history is not None:
        history.copy_(kept)
    graph.replay()
    got = [new] if history is None else [new, history.nan_to_num(0)]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_one_call(feature) -> None:
    x, out, history, noise, table, step, seed = make(**feature)
    with CountCalls() as counted:
        ops.sampler_step(x, out, history, noise, table, step, seed=seed, out=x)
    assert counted.names == ["fastdiff.sampler_step.default"]


def test_runs_without_gradients() -> None:
    x, out, history, noise, table, step, seed = make(**FEATURES["history"])
    leaf = out.clone().requires_grad_()
    for name in ("cpu", "reference"):
        with fastdiff.backend(name):
            got = ops.sampler_step(x, leaf, history, noise, table, step, seed=seed)
        assert not got.requires_grad
        assert not history.requires_grad


def test_more_elements_than_32_bits_count() -> None:
    """Shapes and strides only: meta tensors have no memory."""
    x = torch.empty(3, 4, 2**15, 2**14 + 1, device="meta", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    out = torch.empty(6, 8, *x.shape[2:], device="meta", dtype=torch.bfloat16)
    history = ops.new_history(x, 2)
    table = torch.empty(5, len(COLUMNS) + 2, device="meta")
    seed = torch.empty(3, 2, device="meta", dtype=torch.int64)
    step = torch.tensor(0, device="meta")
    got = ops.sampler_step(x, out, history, None, table, step, seed=seed)
    assert (got.shape, got.device.type, got.stride()) == (x.shape, "meta", x.stride())


X, TABLE, STEP = torch.randn(2, 3, 4, 4), torch.rand(5, len(COLUMNS)) - 2, torch.tensor(0)
DEEP, HISTORY = torch.rand(5, len(COLUMNS) + 2) - 2, torch.zeros(2, *X.shape)
SEED = torch.zeros(2, 2, dtype=torch.int64)
WIDE = torch.zeros(3, *X.shape)


def slot(value):
    table = DEEP.clone()
    table[:, COLUMNS.index("slot")] = value
    return table


REFUSED = {
    "step above": ((X, X, None, None, TABLE, STEP + 5), IndexError),
    "step below": ((X, X, None, None, TABLE, STEP - 1), IndexError),
    "step of another dtype": ((X, X, None, None, TABLE, STEP.int()), TypeError),
    "two steps": ((X, X, None, None, TABLE, STEP.expand(2)), TypeError),
    "columns": ((X, X, None, None, TABLE[:, :9], STEP), ValueError),
    "columns of a history that is not there": ((X, X, None, None, DEEP, STEP), ValueError),
    "no columns for the history": ((X, X, HISTORY, None, TABLE, STEP), ValueError),
    "table of another dtype": ((X, X, None, None, TABLE.double(), STEP), TypeError),
    "table of one row": ((X, X, None, None, TABLE[0], STEP), ValueError),
    "output of another shape": ((X, X[:1], None, None, TABLE, STEP), ValueError),
    "output of three times the channels": (
        (X, X.repeat(1, 3, 1, 1), None, None, TABLE, STEP), ValueError,
    ),
    "output of three times the images": (
        (X, X.repeat(3, 1, 1, 1), None, None, TABLE, STEP), ValueError,
    ),
    "output of another dtype": ((X, X.half(), None, None, TABLE, STEP), TypeError),
    "noise of another shape": ((X, X, None, X[:1], TABLE, STEP), ValueError),
    "noise of another dtype": ((X, X, None, X.half(), TABLE, STEP), TypeError),
    "integers": ((X.long(), X.long(), None, None, TABLE, STEP), TypeError),
    "vector": ((X[0, 0, 0], X[0, 0, 0], None, None, TABLE, STEP), ValueError),
    "history of another shape": ((X, X, HISTORY[..., :3], None, DEEP, STEP), ValueError),
    "history of one slot's shape": ((X, X, HISTORY[0], None, DEEP, STEP), ValueError),
    "history of another dtype": ((X, X, HISTORY.double(), None, DEEP, STEP), TypeError),
    "half history for half images": (
        (X.half(), X.half(), HISTORY.half(), None, DEEP, STEP), TypeError,
    ),
    "history too deep": (
        (X, X, torch.zeros(9, *X.shape), None, torch.rand(5, len(COLUMNS) + 9), STEP), ValueError,
    ),
    "slot above": ((X, X, HISTORY, None, slot(2.0), STEP), IndexError),
    "slot far above": ((X, X, HISTORY, None, slot(1e30), STEP), IndexError),
    "slot infinite": ((X, X, HISTORY, None, slot(torch.inf), STEP), IndexError),
    "seed of another shape": ((X, X, None, None, TABLE, STEP, SEED[:1]), ValueError),
    "seed without images": ((X, X, None, None, TABLE, STEP, SEED[:, 0]), ValueError),
    "seed of another dtype": ((X, X, None, None, TABLE, STEP, SEED.int()), TypeError),
    "noise and seed": ((X, X, None, X, TABLE, STEP, SEED), ValueError),
    "x on another device": ((X.to("meta"), X, None, None, TABLE, STEP), ValueError),
    "table on another device": ((X, X, None, None, TABLE.to("meta"), STEP), ValueError),
    "step on another device": ((X, X, None, None, TABLE, STEP.to("meta")), ValueError),
    "history on another device": ((X, X, HISTORY.to("meta"), None, DEEP, STEP), ValueError),
    "seed on another device": ((X, X, None, None, TABLE, STEP, SEED.to("meta")), ValueError),
    "out on another device": ((X, X, None, None, TABLE, STEP, None, X.to("meta")), ValueError),
    "out of another shape": ((X, X, None, None, TABLE, STEP, None, X[:1].clone()), ValueError),
    "out of another dtype": ((X, X, None, None, TABLE, STEP, None, X.double()), TypeError),
}  # fmt: skip
# What only the kernel looks at: the reference would wait for a GPU, or copies first.
REFUSED_BY_THE_KERNEL = {
    "no rows": ((X, X, None, None, TABLE[:0], STEP), IndexError),
    "slot NaN": ((X, X, HISTORY, None, slot(torch.nan), STEP), IndexError),
    "history overlaps x": ((WIDE[2], X, WIDE[1:], None, slot(0.0), STEP), ValueError),
    "history overlaps the output": ((X, WIDE[2], WIDE[1:], None, slot(0.0), STEP), ValueError),
    "history overlaps the noise": ((X, X, WIDE[1:], WIDE[1], slot(0.0), STEP), ValueError),
    "history overlaps out": (
        (X, X, WIDE[1:], None, slot(0.0), STEP, None, WIDE[2]), ValueError,
    ),
    "history overlaps itself": (
        (X, X, WIDE[:1].expand(2, -1, -1, -1, -1), None, slot(0.0), STEP), ValueError,
    ),
    "out overlaps itself": (
        (X, X, None, None, TABLE, STEP, None, torch.zeros(1, 1, 1, 1).expand(2, 3, 4, 4)),
        ValueError,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error"), (both := {**REFUSED, **REFUSED_BY_THE_KERNEL}).values(), ids=both
)
def test_the_kernel_checks_for_itself(arguments, error) -> None:
    arguments = [*arguments, *[None] * (8 - len(arguments))]
    *most, seed, out = arguments
    before = [None if t is None else t.clone() for t in arguments]
    with pytest.raises(error):
        torch.ops.fastdiff.sampler_step.default(
            *most, seed, torch.empty_like(most[0]) if out is None else out
        )
    with pytest.raises(error):
        ops.sampler_step(*most, seed=seed, out=out)
    for old, new in zip(before, arguments, strict=True):  # nothing was written
        if new is not None and new.device.type == "cpu":
            torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match="model_out must be a dense tensor"):
        ops.sampler_step(X, X.to_sparse(), None, None, TABLE, STEP)


@pytest.mark.parametrize(("arguments", "error"), REFUSED.values(), ids=REFUSED)
def test_the_reference_refuses_the_same(arguments, error) -> None:
    *most, seed, out = [*arguments, *[None] * (8 - len(arguments))]
    with fastdiff.backend("reference"), pytest.raises(error):
        ops.sampler_step(*most, seed=seed, out=out)


def test_the_reference_writes_no_slot_for_nan() -> None:
    history = torch.zeros_like(HISTORY)
    with fastdiff.backend("reference"), contextlib.suppress(IndexError, RuntimeError):
        ops.sampler_step(X, X, history, None, slot(torch.nan), STEP)
    assert not history.any()
