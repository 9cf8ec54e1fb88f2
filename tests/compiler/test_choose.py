"""Choices by the clock, the file that keeps the measurements, and the bound of packed memory."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from dataclasses import replace

import pytest
import torch
from judging import assert_as_eager, compiled
from small import small_inputs, small_net
from test_threads import run_together
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from fastdiff.compiler import backend, explain
from fastdiff.compiler.choose import algorithms, budget, measuring, timings
from fastdiff.compiler.choose.budget import Option, spend
from fastdiff.compiler.choose.sizes import Sizes
from fastdiff.compiler.choose.timings import ALGORITHM_NAMES
from fastdiff.ops.conv2d import conv2d_pack
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, packed_bytes, suits
from fastdiff.ops.conv2d_spec import ConvSpec

AROUND = (1, 1, 1, 1)  # padding
SIZE = Sizes((2, 16, 8, 12), ConvSpec(32, 16, (3, 3), padding=AROUND), torch.float32, 1)
ROW = {**dict.fromkeys(ALGORITHM_NAMES, 3e-3), "plain": 4e-3, "winograd2": 2e-3, "winograd4": 1e-3,
       "strassen": 2e-3, "phases4": 1e-3}  # fmt: skip
OF_3X3 = SIZE.among(ALGORITHM_NAMES)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """By the clock, with an empty cache, as in a process that has just begun."""
    monkeypatch.setenv("FASTDIFF_PLAN", "measured")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timings, "_tables", {})
    monkeypatch.setattr(timings, "_unsure_keys", set())
    monkeypatch.setattr(timings, "_disturbed", {})
    monkeypatch.setattr(measuring, "_interruptions", lambda: 0)
    return tmp_path / "cache"


@pytest.fixture
def clock(monkeypatch):
    """Seconds that are said to be measured, and the sizes that have been."""
    seen = []

    def prefer(name):
        def measure(size, names, weights):
            seen.append(size)
            return {n: ROW[n] / (100 if n == name else 1) for n in names}, True

        monkeypatch.setattr(timings, "measure", measure)
        return seen

    return prefer


def forget():
    """What a process knows by heart."""
    timings._tables.clear()


def written(file):
    return json.loads(file.read_text())


# -- the file


def test_measurements_are_kept(cache, monkeypatch):
    monkeypatch.setattr(measuring, "AGREEING_RATIO", 1e9)  # on a busy machine too
    first = timings.seconds_by_algorithm([SIZE, SIZE])
    assert first[0] == first[1]
    assert set(first[0]) == set(OF_3X3)
    assert all(0 < seconds < 10 for seconds in first[0].values())
    forget()
    assert timings.seconds_by_algorithm([SIZE]) == first[:1]
    assert [file.name for file in cache.iterdir()] == [timings.cache_file().name]


def test_rows_are_named_as_in_files_that_users_have():
    assert SIZE.key == "2,16,8,12,32,16,3,3,1,1,1,1,1,1,0,0,float32,1"
    upsampled = replace(SIZE.spec, upsample=True, padding=(0, 2, 3, 1), stride=(1, 2))
    other = replace(SIZE, spec=upsampled, dtype=torch.bfloat16, threads=4)
    assert other.key == "2,16,8,12,32,16,3,3,1,2,0,2,3,1,1,0,bfloat16,4"


def test_what_is_not_measured_is_not_measured_twice(clock):
    seen = clock("direct")
    around = replace(SIZE, spec=replace(SIZE.spec, statistics=True))
    assert (
        timings.seconds_by_algorithm([SIZE, around])
        == [timings.seconds_by_algorithm([SIZE])[0]] * 2
    )
    assert seen == [SIZE]


def test_each_size_is_measured_once(clock):
    seen = clock("direct")
    other = replace(SIZE, x=(1, 16, 8, 12))
    timings.seconds_by_algorithm([SIZE, other, SIZE])
    forget()
    timings.seconds_by_algorithm([other])
    timings.seconds_by_algorithm([SIZE])
    assert seen == [SIZE, other]


def test_only_what_is_wanted_is_measured():
    assert set(timings.seconds_by_algorithm([SIZE], ("plain", "direct"))[0]) == {"plain", "direct"}
    assert set(timings.seconds_by_algorithm([SIZE])[0]) == set(OF_3X3)
    strided = replace(SIZE, spec=replace(SIZE.spec, stride=(2, 2)))
    assert set(timings.seconds_by_algorithm([strided])[0]) == {"plain", "direct"}


@pytest.mark.parametrize(
    "size",
    [
        Sizes((1, 5, 4, 3), ConvSpec(7, 5), torch.bfloat16, 1),
        Sizes((2, 5, 4, 3), ConvSpec(7, 5, (3, 3), (2, 2), (0, 1, 0, 1)), torch.float32, 1),
        Sizes((2, 5, 4, 3), ConvSpec(7, 5, (3, 3), (1, 1), AROUND, True), torch.float32, 1),
        Sizes((1, 640, 2, 2), ConvSpec(512, 640, (3, 3), (1, 1), AROUND), torch.float32, 1),
    ],
    ids=["1x1", "strided", "upsampled", "large"],
)
def test_measuring_any_size(size):
    row = timings.seconds_by_algorithm([size])[0]
    assert set(row) == set(size.among(ALGORITHM_NAMES))
    assert all(0 < seconds < 10 for seconds in row.values())


def test_every_weight_is_a_part_of_the_same_constants(monkeypatch):
    """None is packed, since that takes longer, and none is read twice while it is in a cache."""
    given, time = [], measuring._time

    def spy(sizes, name, x, weight):
        assert name == "plain" or weight.nbytes == packed_bytes(name, sizes.spec.weight)
        given.append((weight.data_ptr(), weight.data_ptr() + weight.nbytes))
        return time(sizes, name, x, weight)

    monkeypatch.setattr(measuring, "_time", spy)
    timings.seconds_by_algorithm([SIZE])
    begin, end = min(first for first, _ in given), max(last for _, last in given)
    assert end - begin <= measuring.COLD_BYTES
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(given))
    assert measuring.constants(5).tolist() == [0.5, 0.5, 0.5]


@pytest.fixture
def scripted(monkeypatch):
    """The measurement of ``SIZE`` from given seconds, calls and interruptions by algorithm."""

    def measure(seconds, interrupted=()):
        calls, turns = [], {name: iter(row) for name, row in seconds.items()}

        def time(sizes, name, *_):
            calls.append(name)
            return next(turns[name])

        count = itertools.count()
        hits = {2 * i + 1 for i in interrupted}  # it is asked before and after each call
        seen = itertools.accumulate(int(i in hits) for i in count)
        monkeypatch.setattr(measuring, "_time", time)
        monkeypatch.setattr(measuring, "_interruptions", lambda: next(seen))
        result = measuring.measure(SIZE, tuple(seconds), torch.empty(0))
        return result, {name: calls.count(name) for name in seconds}

    return measure


def test_slow_algorithms_are_not_repeated(scripted):
    (times, sure), calls = scripted(
        {"plain": [1.0], "direct": [0.01], "winograd2": [0.001] * 3, "winograd4": [0.06]}
    )
    assert times == {"plain": 1.0, "direct": 0.01, "winograd2": 0.001, "winograd4": 0.06}
    assert sure
    assert calls == {"plain": 1, "direct": 1, "winograd2": 3, "winograd4": 1}


def test_the_quicker_of_two_slow_calls_counts(scripted):
    row = [0.31, 0.3]
    (times, sure), calls = scripted({"plain": [0.33, 0.34], "direct": row})
    assert times == {"plain": 0.33, "direct": 0.3}
    assert sure
    assert calls == {"plain": 2, "direct": 2}


def test_what_is_clearly_slower_is_not_called_a_third_time(scripted):
    (times, _), calls = scripted({"plain": [6e-3, 6e-3], "direct": [4e-3, 3e-3, 3e-3]})
    assert times == {"plain": 6e-3, "direct": 3e-3}
    assert calls == {"plain": 2, "direct": 3}


def test_a_cold_first_call_does_not_count(scripted):
    row = [5e-4, 2e-3, 1e-3, 1.1e-3]
    (times, sure), _ = scripted({"plain": row, "direct": row})
    assert times == {"plain": 1e-3, "direct": 1e-3}
    assert sure


def test_calls_that_were_interrupted_do_not_count(scripted):
    row = [8e-3, 7e-3, 1e-3, 8e-3, 1.1e-3]
    (times, sure), calls = scripted({"direct": row}, interrupted=[1, 3])
    assert (times, sure, calls) == ({"direct": 1e-3}, True, {"direct": 5})


def test_slow_calls_count_though_they_were_interrupted(scripted):
    (times, sure), calls = scripted({"direct": [0.3, 0.2]}, interrupted=[0, 1])
    assert (times, sure, calls) == ({"direct": 0.2}, True, {"direct": 2})


def test_what_was_always_interrupted_is_chosen_by_its_size(monkeypatch):
    interruptions = itertools.count()
    monkeypatch.setattr(measuring, "_time", lambda sizes, name, *_: ROW[name] / 100)
    monkeypatch.setattr(measuring, "_interruptions", lambda: next(interruptions))
    monkeypatch.setattr(algorithms, "heuristic", lambda size: {**ROW, "direct": 1e-9})
    assert algorithms.choose(SIZE, ALGORITHM_NAMES, measured=True) == "direct"
    rows = {SIZE.key: {name: ROW[name] / 100 for name in OF_3X3}}
    assert written(timings.cache_file())["seconds"] == {}
    assert written(timings.cache_file())["disturbed"] == rows


def test_a_second_disturbed_measurement_is_final(clock, monkeypatch):
    """A machine that is always busy does not measure in every process."""
    seen, given = [], iter([{"plain": 2.0, "direct": 4.0}, {"plain": 5.0, "direct": 1.0}])

    def measure(size, names, weights):
        seen.append(size)
        return next(given), False

    monkeypatch.setattr(timings, "measure", measure)
    names = ("plain", "direct")
    assert timings.seconds_by_algorithm([SIZE], names) == [{"plain": 2.0, "direct": 4.0}]
    assert timings.seconds_by_algorithm([SIZE], names) == [{"plain": 2.0, "direct": 4.0}]
    assert not timings.is_sure(SIZE)
    for _ in range(2):
        forget()
        assert timings.seconds_by_algorithm([SIZE], names) == [{"plain": 2.0, "direct": 1.0}]
        assert timings.is_sure(SIZE)
    assert seen == [SIZE, SIZE]
    assert written(timings.cache_file())["disturbed"] == {}


def test_a_busy_machine_is_asked_more_often(scripted):
    busy = [8e-3, 1.9e-3, 1.6e-3, 1e-3, 1.9e-3, 0.5e-3, 0.52e-3]
    (times, sure), _ = scripted({"plain": busy, "direct": busy})
    assert (times, sure) == ({"plain": 0.5e-3, "direct": 0.5e-3}, True)
    falling = [1e-3 / 1.2**turn for turn in range(13)]
    (_, sure), calls = scripted({"plain": falling, "direct": falling})
    assert (sure, calls) == (False, {"plain": 13, "direct": 13})


def machine():
    return timings._machine()


BROKEN = {
    "not JSON": b"{",
    "empty": b"",
    "not text": b"\xff\xfe\x00",
    "nested too deep": b"[" * 100_000,
    "a list": b"[]",
    "a number": b"1",
    "without a machine": json.dumps({"seconds": {SIZE.key: ROW}}).encode(),
    "without seconds": json.dumps({"machine": machine()}).encode(),
    "seconds are a list": json.dumps({"machine": machine(), "seconds": [ROW]}).encode(),
    "no seconds at all": json.dumps({"machine": machine(), "seconds": None}).encode(),
    **{
        f"another {name}": json.dumps(
            {"machine": {**machine(), name: 0}, "seconds": {SIZE.key: ROW}}
        ).encode()
        for name in machine()
    },
    **{
        f"a row is {bad!r}": json.dumps(
            {"machine": machine(), "seconds": {SIZE.key: bad}}
        ).encode()
        for bad in (
            None, 1.0, [1.0], "direct", {**ROW, "direct": "1"}, {**ROW, "direct": None},
            {**ROW, "direct": True}, {**ROW, "direct": -1.0}, {**ROW, "direct": 0.0},
            {**ROW, "direct": math.nan}, {**ROW, "direct": math.inf}, {**ROW, "magic": 1.0},
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_cannot_be_believed(cache, clock, caplog, content):
    seen = clock("direct")
    cache.mkdir()
    timings.cache_file().write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="fastdiff.compiler"):
        assert timings.seconds_by_algorithm([SIZE])[0]["direct"] == ROW["direct"] / 100
    assert seen == [SIZE]
    assert [str(timings.cache_file()) in record.getMessage() for record in caplog.records] == [True]
    assert written(timings.cache_file())["machine"] == machine()
    forget()
    caplog.clear()
    timings.seconds_by_algorithm([SIZE])
    assert seen == [SIZE]
    assert not caplog.records


def test_a_row_that_is_incomplete_is_measured(cache, clock):
    seen = clock("direct")
    cache.mkdir()
    row = {"plain": 1.0, "direct": 1.0}
    timings.cache_file().write_text(json.dumps({"machine": machine(), "seconds": {SIZE.key: row}}))
    assert timings.seconds_by_algorithm([SIZE], ("plain", "direct")) == [row]
    assert not seen
    assert timings.seconds_by_algorithm([SIZE])[0]["winograd4"] == ROW["winograd4"]
    assert seen == [SIZE]


def test_a_folder_in_the_place_of_the_file(caplog, clock):
    clock("direct")
    timings.cache_file().mkdir(parents=True)
    timings.seconds_by_algorithm([SIZE])
    timings.seconds_by_algorithm([SIZE])
    assert ["used" in r.getMessage() or "written" in r.getMessage() for r in caplog.records] == [
        True, True,
    ]  # fmt: skip
    assert not list(timings.cache_file().parent.glob("*.new"))


def test_a_file_in_the_place_of_the_folder(cache, caplog, clock):
    seen = clock("direct")
    cache.write_text("")
    timings.seconds_by_algorithm([SIZE])
    timings.seconds_by_algorithm([SIZE])
    assert seen == [SIZE]
    assert any("cannot be written" in r.getMessage() for r in caplog.records)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(cache, caplog, clock):
    seen = clock("direct")
    cache.mkdir(mode=0o500)
    timings.seconds_by_algorithm([SIZE])
    timings.seconds_by_algorithm([SIZE])
    assert seen == [SIZE]
    assert any("cannot be written" in r.getMessage() for r in caplog.records)


def test_no_home(monkeypatch, clock):
    seen = clock("direct")
    monkeypatch.delenv("FASTDIFF_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(timings.Path, "home", home)
    assert timings.cache_file() is None
    timings.seconds_by_algorithm([SIZE])
    timings.seconds_by_algorithm([SIZE])
    assert seen == [SIZE]


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timings.cache_file().parent == tmp_path / "fastdiff"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert timings.cache_file().parent == tmp_path / ".cache" / "fastdiff"
    monkeypatch.setenv("FASTDIFF_CACHE", "~/measured")
    assert timings.cache_file().parent == tmp_path / "measured"


def test_what_others_have_measured_meanwhile_stays(clock):
    clock("direct")
    other = replace(SIZE, x=(1, 16, 8, 12))
    timings.seconds_by_algorithm([SIZE])
    content = written(timings.cache_file())
    content["seconds"][other.key] = ROW
    timings.cache_file().write_text(json.dumps(content))
    third = replace(SIZE, x=(5, 16, 8, 12))
    timings.seconds_by_algorithm([third])
    assert set(written(timings.cache_file())["seconds"]) == {SIZE.key, other.key, third.key}
    assert timings.seconds_by_algorithm([other]) == [ROW]


def test_threads_measure_once(clock):
    seen = clock("direct")
    run_together(lambda index: timings.seconds_by_algorithm([SIZE]))
    assert seen == [SIZE]


# -- the choice


@pytest.mark.parametrize(
    ("row", "allowed", "wanted"),
    [
        (ROW, ALGORITHM_NAMES, "winograd4"),
        (ROW, ("plain", "direct"), "direct"),
        (ROW, ("plain",), "plain"),
        ({**ROW, "plain": 0.79e-3}, ALGORITHM_NAMES, "plain"),
        ({**ROW, "plain": 0.81e-3}, ALGORITHM_NAMES, "winograd4"),
        ({**ROW, "plain": 2.3e-3}, ("plain", "direct"), "plain"),
        ({**ROW, "winograd2": 1e-4}, ALGORITHM_NAMES, "winograd2"),
        ({**ROW, "winograd2": 1e-4}, ("plain", "winograd4"), "winograd4"),
        ({**ROW, "direct": 1e-4}, ALGORITHM_NAMES, "direct"),
    ],
)
def test_the_quickest_allowed(monkeypatch, row, allowed, wanted):
    def measure(size, names, weights):
        return {name: row[name] for name in names}, True

    monkeypatch.setattr(timings, "measure", measure)
    assert algorithms.choose(SIZE, allowed, measured=True) == wanted


@pytest.mark.parametrize(("share", "wanted"), [(0.99, "direct"), (0.97, "strassen")])
def test_strassens_weights_must_be_worth_their_memory(monkeypatch, share, wanted):
    size = Sizes((2, 64, 8, 12), ConvSpec(32, 64), torch.float32, 1)
    row = {"plain": 1.0, "direct": 1e-3, "strassen": share * 1e-3}
    monkeypatch.setattr(timings, "measure", lambda size, names, weights: (row, True))
    assert algorithms.choose(size, ALGORITHM_NAMES, measured=True) == wanted


@pytest.mark.parametrize(
    ("x", "weight", "stride", "wanted"),
    [
        ((1, 64, 32, 32), (64, 64, 3, 3), 1, "winograd4"),
        ((1, 64, 8, 8), (64, 64, 3, 3), 1, "winograd2"),
        ((4, 64, 8, 8), (64, 64, 3, 3), 1, "winograd4"),
        ((1, 3, 32, 32), (64, 3, 3, 3), 1, "direct"),
        ((1, 64, 32, 32), (64, 64, 3, 3), 2, "direct"),
        ((1, 64, 32, 32), (64, 64, 1, 1), 1, "direct"),
        ((1, 320, 32, 32), (320, 320, 1, 1), 1, "strassen"),
        ((1, 320, 8, 8), (320, 320, 1, 1), 1, "direct"),
    ],
)
def test_heuristic(monkeypatch, cache, x, weight, stride, wanted):
    monkeypatch.setattr(timings, "seconds_by_algorithm", None)
    sides = (weight[2] // 2,) * 4
    spec = ConvSpec(*weight[:2], weight[2:], (stride, stride), sides)
    size = Sizes(x, spec, torch.float32, 1)
    assert algorithms.choose(size, ALGORITHM_NAMES, measured=False) == wanted
    assert algorithms.choose(size, ("plain", "direct"), measured=False) == "direct"


@torch.no_grad()
def test_heuristic_touches_no_file(monkeypatch, cache):
    monkeypatch.setenv("FASTDIFF_PLAN", "heuristic")
    monkeypatch.setattr(timings, "seconds_by_algorithm", None)
    model, case = small_net(), small_inputs(3, (16, 24))
    assert_as_eager(compiled(model)(*case), model, case)
    assert not cache.exists()


@pytest.mark.parametrize("value", ["", "fastest", "Measured"])
def test_an_unknown_plan(monkeypatch, value):
    monkeypatch.setenv("FASTDIFF_PLAN", value)
    text = f"FASTDIFF_PLAN must be measured or heuristic, got {value!r}"
    with pytest.raises(ValueError, match=text):
        backend(torch.fx.GraphModule({}, torch.fx.Graph()), [])
    with pytest.raises(BackendCompilerFailed, match=text), torch.no_grad():
        compiled(small_net())(*small_inputs())


@torch.no_grad()
def test_measured_for_real(cache, caplog, monkeypatch):
    monkeypatch.setattr(measuring, "AGREEING_RATIO", 1e9)
    model, case = small_net(), small_inputs()
    with caplog.at_level(logging.INFO, logger="fastdiff.compiler"):
        assert_as_eager(compiled(model)(*case), model, case)
    assert ["measuring" in record.getMessage() for record in caplog.records] == [True]
    assert written(timings.cache_file())["seconds"]


def runs(name):
    """Whether an algorithm runs on this machine: one that suits nothing has no least spec."""
    specs = (ConvSpec(32, 32), ConvSpec(1, 1, (3, 3), padding=AROUND, upsample=True, silu=True))
    return any(suits(name, spec) for spec in specs)


@pytest.mark.parametrize("precision", ["fast", "strict"])
@pytest.mark.parametrize("name", [n for n in ALGORITHM_NAMES if n == "plain" or runs(n)])
@torch.no_grad()
def test_whatever_is_preferred_is_right(clock, name, precision):
    clock(name)
    float32 = name == "plain" or torch.float32 in ALGORITHMS[name].dtypes
    dtype, options = torch.float32 if float32 else torch.bfloat16, {"precision": precision}
    model, case = small_net().to(dtype), small_inputs(3, (5, 7), dtype=dtype)
    assert_as_eager(compiled(model, options=options)(*case), model, case, precision=precision)
    used = {row.algorithm for row in explain(model, *case, options=options).fused}
    if precision == "strict":
        assert not any("winograd" in algorithm for algorithm in used)
    elif "phases" not in name:  # it does not upsample: see the next
        assert name in used


@torch.no_grad()
def test_upsampled_convolutions_by_phases(clock):
    clock("phases4")
    model = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 12, 3, padding=1), nn.Tanh())
    x = torch.randn(2, 8, 5, 7)
    assert_as_eager(compiled(model.eval())(x), model, (x,))
    assert [row.algorithm for row in explain(model, x).fused] == ["phases4"]
    strict = explain(model, x, options={"precision": "strict"}).fused
    assert [row.algorithm for row in strict] == ["direct"]


@torch.no_grad()
def test_linear_layers_by_strassen(clock):
    clock("strassen")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(x).unflatten(2, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2)) + x

    model, x = Block().eval(), torch.randn(2, 50, 64)
    assert_as_eager(compiled(model)(x), model, (x,))
    rows = explain(model, x).fused
    assert [row.algorithm for row in rows if "linear" in row.what] == ["strassen"] * 2
    assert "strassen" not in {
        row.algorithm for row in explain(model, x, options={"precision": "strict"}).fused
    }


@torch.no_grad()
def test_all_sizes_are_measured_when_the_graph_is_compiled(clock, monkeypatch):
    """Those that the model then runs with, and none besides."""
    seen, batches, of = clock("direct"), [], timings.seconds_by_algorithm

    def note(sizes, *names):
        batches.append(len(seen))
        return of(sizes, *names)

    monkeypatch.setattr(timings, "seconds_by_algorithm", note)
    model, case = small_net(), small_inputs()
    net = compiled(model)
    net(*case)
    assert batches[0] == 0
    assert len(batches) > 1
    assert set(batches[1:]) == {len(seen)}
    assert len({size.key for size in seen}) == len(seen)


@torch.no_grad()
def test_new_sizes_are_measured_once_and_without_a_new_graph(clock):
    seen = clock("winograd2")
    model = small_net()
    net = compiled(model, dynamic=True)
    counts = []
    for batch, size in ((2, (8, 12)), (3, (16, 16)), (2, (8, 12)), (3, (16, 16)), (0, (8, 12))):
        case = small_inputs(batch, size)
        assert_as_eager(net(*case), model, case)
        counts.append(len(seen))
    assert 0 < counts[0] < counts[1] == counts[-1]
    assert len({size.key for size in seen}) == len(seen)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_a_new_size_in_many_threads(clock):
    seen = clock("winograd4")
    model = small_net()
    net = compiled(model, dynamic=True)
    case, found = small_inputs(3, (16, 16)), {}
    with torch.no_grad():
        net(*small_inputs())
    run_together(lambda index: found.update({index: net(*case)}))
    for out in found.values():
        assert_as_eager(out, model, case)
    assert len({size.key for size in seen}) == len(seen)


def test_measuring_changes_nothing_around_it():
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.enable_grad():
        timings.seconds_by_algorithm([SIZE])
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


# -- the bound


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (16, 16), (17, 33), (3, 128), (40, 64)])
def test_packed_bytes_of_a_weight(name, size):
    for kernel in ((1, 1), (3, 3)):
        spec = ConvSpec(*size, kernel, padding=AROUND, upsample=True)
        if suits(name, spec):
            packed = conv2d_pack(torch.ones(spec.weight), name)
            assert algorithms.packed_bytes(name, spec) == packed.nbytes


def test_nothing_is_packed_for_plain():
    assert algorithms.packed_bytes("plain", SIZE.spec) == 0


@pytest.mark.parametrize(
    ("value", "dtype"), [("measured", torch.float32), ("heuristic", torch.bfloat16)], ids=str
)
@torch.no_grad()
def test_the_bound_holds_and_more_is_more(monkeypatch, clock, value, dtype):
    monkeypatch.setenv("FASTDIFF_PLAN", value)
    clock("")
    model, case = small_net().to(dtype), small_inputs(3, (16, 24), dtype=dtype)
    found = []
    for bound in (0, 10_000, 30_000, 70_000, 10**12, None):
        torch.compiler.reset()
        options = {"packed_bytes": bound}
        assert_as_eager(compiled(model, options=options)(*case), model, case)
        told = explain(model, *case, options=options)
        assert bound is None or told.packed_bytes <= bound
        found.append(told.packed_bytes)
        if bound == 0:
            assert {row.algorithm for row in told.fused} <= {"plain", "streamed"}
    assert found[:-1] == sorted(found[:-1])
    assert found[0] == 0 < found[2] < found[3] < found[-2]


@torch.no_grad()
def test_memory_goes_where_it_saves_the_most(monkeypatch):
    """Of two convolutions by weights of one size, the one for the larger images."""
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(),
    ).eval()  # fmt: skip
    x = torch.randn(2, 16, 24, 24, generator=torch.Generator().manual_seed(0))

    def measure(size, names, weights):
        return {n: ROW[n] * size.x[2] for n in names}, True

    monkeypatch.setattr(timings, "measure", measure)
    for name in ("direct", "winograd2"):
        bound = algorithms.packed_bytes(name, ConvSpec(16, 16, (3, 3)))
        rows = explain(model, x, options={"packed_bytes": bound}).fused
        assert [row.algorithm for row in rows] == [name, "plain"]


@torch.no_grad()
def test_a_shared_weight_is_paid_for_once(clock):
    clock("winograd4")
    conv = nn.Conv2d(16, 16, 3, padding=1)
    model = nn.Sequential(conv, nn.Tanh(), conv, nn.Tanh()).eval()
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    size = algorithms.packed_bytes("winograd4", ConvSpec(16, 16, (3, 3)))
    for bound in (size, None):
        told = explain(model, x, options={"packed_bytes": bound})
        assert [row.algorithm for row in told.fused] == ["winograd4"] * 2
        assert told.packed_bytes == size


@torch.no_grad()
def test_bounded_and_dynamic(clock):
    """What is allowed is fixed; other sizes make do with it."""
    clock("")
    model, bound = small_net(), 100_000
    options = {"packed_bytes": bound}
    net = compiled(model, options=options, dynamic=True)
    for batch, size in ((2, (8, 12)), (3, (16, 16)), (7, (24, 4)), (3, (5, 7))):
        case = small_inputs(batch, size)
        assert_as_eager(net(*case), model, case)
        assert explain(model, *case, options=options, dynamic=True).packed_bytes <= bound


@torch.no_grad()
def test_a_large_bound_is_none(monkeypatch, clock):
    """Every algorithm that a later size may want is there."""
    clock("direct")
    case, found = small_inputs(3, (16, 24)), []
    original = budget.Budget.allowed

    def note(self, weights):
        found[-1].append(original(self, weights))
        return original(self, weights)

    monkeypatch.setattr(budget.Budget, "allowed", note)
    for bound in (None, 10**12):
        found.append([])
        explain(small_net(), *case, options={"packed_bytes": bound})
    every = {tuple(OF_3X3), ("plain", "direct", "strassen"), ("plain", "direct")}
    assert set(found[1]) == every


def test_spending():
    """By hand: 3 seconds for 10 bytes, then 1 for 10, of which only what fits is bought."""
    rows = [
        [Option(0, 5.0), Option(10, 2.0), Option(30, 1.5)],
        [Option(0, 5.0), Option(10, 4.0)],
        [Option(0, 1.0), Option(1, 2.0)],
    ]
    sizes = {
        bound: [option.size for option in spend(rows, bound)[0]]
        for bound in (0, 9, 10, 19, 20, 39, 40)
    }
    assert sizes == {
        0: [0, 0, 0], 9: [0, 0, 0], 10: [10, 0, 0], 19: [10, 0, 0], 20: [10, 10, 0],
        39: [10, 10, 0], 40: [30, 10, 0],
    }  # fmt: skip
    assert spend(rows, 45)[1] == 5
    assert spend([], 3) == ([], 3)


def test_spending_is_monotone():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        numbers = torch.rand(6, 4, 2, generator=generator)
        rows = [
            [Option(0, 1.0)] + [Option(1 + int(100 * a), float(b)) for a, b in row.tolist()]
            for row in numbers
        ]
        before = 0
        for bound in range(0, 640, 7):
            chosen, left = spend(rows, bound)
            size = sum(option.size for option in chosen)
            assert size + left == bound
            assert left >= 0
            assert size >= before
            before = size
